"""The names that a recipe may use. Without torch, so that a recipe can be read where nothing is computed."""

from typing import Literal

Prediction = Literal["epsilon", "x0", "v"]
Loss = Literal["simple", "vlb", "hybrid"]
NoiseLevels = Literal["log_normal", "uniform", "importance"]
Weighting = Literal["none", "min_snr", "p2"]
Error = Literal["squared", "absolute"]
SamplerName = Literal["ancestral", "ddim", "dpmpp"]
Spacing = Literal["karras", "uniform_time", "uniform_log_snr"]
