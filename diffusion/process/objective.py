"""Training objectives: the simple loss with its weights, as functions of the network's output. Returns [batch] losses."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.process.names import Error, Prediction, Weighting
from diffusion.process.prediction import loss_weight, target
from diffusion.process.schedule import noise_variance


def weight(weighting: Weighting, prediction: Prediction, log_snr: Tensor, gamma: float) -> Tensor:
    """The factor [batch] on the prediction's squared error, float64.

    none: 1.
    min_snr: min(SNR, gamma) on the error of x0 (Hang et al. 2023, arXiv:2303.09556, section 3.4); for v that is
        min(SNR, gamma) / (SNR + 1).
    p2: 1 / (1 + SNR)^gamma on the error of epsilon (Choi et al. 2022, arXiv:2204.00227, eq. 8, k = 1).
    """
    log_snr = log_snr.double()
    if weighting == "none":
        return torch.ones_like(log_snr)
    of_x0 = (
        torch.exp(log_snr).clamp(max=gamma)
        if weighting == "min_snr"
        else torch.exp(log_snr) * noise_variance(log_snr) ** gamma
    )
    return loss_weight(prediction, of_x0, log_snr)


def simple_loss(
    output: Tensor,
    x0: Tensor,
    epsilon: Tensor,
    log_snr: Tensor,
    prediction: Prediction,
    weighting: Weighting = "none",
    gamma: float = 5.0,
    error: Error = "squared",
) -> Tensor:
    """The weighted error of the prediction, averaged over channels and pixels: [batch], float32 or better.

    Ho et al. 2020, eq. 14, for any prediction.
    """
    difference = output.to(torch.promote_types(output.dtype, torch.float32)) - target(prediction, x0, epsilon, log_snr)
    elementwise = difference.square() if error == "squared" else difference.abs()
    per_image = elementwise.flatten(1).mean(1)
    return per_image * weight(weighting, prediction, log_snr, gamma).to(per_image)
