"""The recipe: everything that can change the weights or the scores, in one frozen value. The machine is not in it."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from diffusion.errors import RecipeError
from diffusion.features.identity import ExtractorName
from diffusion.process.choices import Error, Loss, NoiseLevels, Prediction, SamplerName, Spacing, Weighting
from diffusion.trust.identifiers import RunName, Sha256


class Part(BaseModel):
    """A part of the recipe: frozen, and without room for a misspelt key. Each field's docstring is in its JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields that came after recipes had been kept: written only where they are not the default, so that the digests of
    those recipes, and of checkpoints that hold them, stay what they are."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in self.LATER}
        return {
            name: value
            for name, value in serialize(self).items()
            if name not in defaults or getattr(self, name) != defaults[name]
        }


IMAGES = 10**10
"""Upper end of all counts of images: a hundred thousand epochs and more of any set of patches."""
MOST_MILESTONES = 10_000
MOST_CHANNELS = 8192
"""Of a layer."""


class Data(Part):
    """What a training step sees."""

    image_size: int = Field(default=64, ge=8, le=256)
    """Height and width; larger images of a dataset are averaged down by a whole factor."""
    images: int = Field(gt=0, le=IMAGES)
    """The budget: images seen in all (an epoch of EuroSAT has 24,300)."""
    batch_size: int = Field(gt=0, le=2**20)
    """Images a step, over all processes together."""
    lanes: int = Field(default=1, gt=0, le=2**12)
    """Parts that a batch is cut into: a power of two that divides it. A lane is one micro-batch; a process works on whole lanes, so
    they are the most processes."""
    window_shards: int = Field(default=8, gt=0, le=2**16)
    """Whole shards that are shuffled together."""
    horizontal_flip: bool = True
    """Mirror about half of the images left to right, one of the symmetries that patches break least (docs/experiments.md)."""
    quarter_turns: float = Field(default=0.0, ge=0, lt=1)
    """Share of images turned by one, two or three quarters. The network is told, and samples as if by none. With the
    mirror, all eight symmetries of the square."""


class Network(Part):
    """The U-Net's size."""

    kind: Literal["unet", "seed"] = "unet"
    """unet: residual blocks with adaptive group norm and attention. seed: the small batch-norm network of old."""
    width: int = Field(default=64, gt=0, le=MOST_CHANNELS, multiple_of=8)
    """Channels at the highest resolution."""
    multipliers: tuple[Annotated[int, Field(gt=0, le=64)], ...] = Field(default=(1, 2, 2), min_length=1, max_length=8)
    """Channels of each resolution in units of `width`; the resolution halves from one to the next."""
    blocks: int = Field(default=2, gt=0, le=64)
    """Residual blocks at each resolution."""
    attention_below: int = Field(default=16, ge=0, le=1024)
    """Resolutions up to this have attention."""
    patch: int = Field(default=1, ge=1, le=64)
    """Squares of this many pixels become channels before the first layer."""
    class_conditional: bool = True
    """Whether the network is told the class."""
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of images whose class is withheld, so that the network also learns to do without."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations dropped in each block."""


class Process(Part):
    """The forward process and what is predicted of it."""

    schedule: Literal["cosine", "cosine_discrete", "linear"] = "cosine"
    """cosine: continuous time between the two ends below. cosine_discrete, linear: the published tables of `steps`. Sampling and
    the bound follow its shape; training does with `objective.noise_levels: uniform` or `importance`, else its ends alone."""
    log_snr_max: float = Field(default=7.5, ge=-60, le=60)
    """The clean end of the continuous schedule: noise of about one grey level, where the bound is tightest."""
    log_snr_min: float = Field(default=-10.0, ge=-60, le=60)
    """The noisy end of the continuous schedule."""
    steps: int = Field(default=1000, ge=2, le=4000)
    """T: the steps of the discrete tables, and of the chain whose bound is bits/dim."""
    zero_terminal_snr: bool = False
    """Make the last step of a discrete table pure noise."""
    prediction: Prediction = "v"
    """What the network predicts."""


class Objective(Part):
    """The loss."""

    LATER = ("alignment",)

    loss: Loss = "simple"
    """simple: the weighted error of the prediction. vlb: the variational bound, with learned variances. hybrid: simple,
    and the bound for the variances alone."""
    bound_weight: float = Field(default=1e-3, ge=0, le=1e6)
    """Weight of the bound in `hybrid` (Nichol & Dhariwal 2021, section 3.1)."""
    noise_levels: NoiseLevels = "log_normal"
    """How training draws noise levels. log_normal: log_snr from a normal. uniform: time, evenly over the schedule.
    importance: by the second moments of the losses so far, which are weighted to mean what `uniform` means."""
    log_snr_mean: float = Field(default=1.0, ge=-60, le=60)
    """Of the normal."""
    log_snr_std: float = Field(default=2.4, gt=0, le=60)
    """Of the normal."""
    weighting: Weighting = "none"
    """The weight on the error of the prediction."""
    gamma: float = Field(default=5.0, ge=0, le=1e6)
    """Parameter of the weights `min_snr` and `p2`."""
    error: Error = "squared"
    """Squared or absolute error."""
    alignment: float = Field(default=0.0, ge=0, le=1e3)
    """Weight of a second task in training: the U-Net's middle must tell the features of the clean image (Yu et al. 2025,
    arXiv:2410.06940). They are those of eurosat or own, which stands in `evaluation.extractors` behind the one that judges. 0.5 is
    usual; it costs one pass of that network over each image, 0.15 GFLOP."""


class Optimizer(Part):
    """How the weights follow the gradient."""

    kind: Literal["adamw", "muon"] = "muon"
    """adamw: Loshchilov & Hutter 2019, arXiv:1711.05101. muon: orthogonalised momentum for the weights of the blocks (Jordan
    et al. 2024), AdamW for all else."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """After warm-up."""
    warmup_images: int = Field(default=0, ge=0, le=IMAGES)
    """Images over which the rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the rate does after warm-up; cosine falls to zero at the end of the budget."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of AdamW's two moments."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    """Decoupled weight decay."""
    clip_norm: float = Field(default=1.0, gt=0, le=1e12)
    """The gradient is scaled down to this norm."""


class MovingAverage(Part):
    """The weights that are sampled from."""

    half_lives: tuple[Annotated[float, Field(gt=0, le=100 * IMAGES)], ...] = Field(
        default=(500_000,), min_length=1, max_length=16
    )
    """Images after which an old weight counts half, for each of the averages that are kept. The first is scored on the
    way; after training the best is chosen, by the FID of samples that its scores do not use."""
    ramp: Annotated[float, Field(gt=0, le=1e6)] | None = 0.05
    """No half-life is more than this share of the images seen so far; null: never shortened."""


class Evaluation(Part):
    """How a checkpoint is scored."""

    LATER = ("guidance_interval",)

    every_images: int = Field(gt=0, le=IMAGES)
    """A milestone, with an evaluation, each time this many images have been seen (and at the end)."""
    samples: int = Field(default=10_000, ge=2, le=10**6)
    """Images generated at each milestone; the same everywhere, since FID depends on it."""
    likelihood_images: int = Field(default=512, ge=2, le=10**6)
    """Held-out images whose bound is measured."""
    likelihood_timesteps: int = Field(default=8, ge=1, le=10**6)
    """Transitions of the chain that are measured for each of them; process.steps - 1 or more: all, the exact sum."""
    sampler: SamplerName = "dpmpp"
    """The sampler."""
    sampler_steps: int = Field(default=20, ge=1, le=10_000)
    """Its network evaluations."""
    spacing: Spacing = "karras"
    """Where it places them."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Fresh noise in the steps of `ddim`: 0 none, 1 as much as the ancestral chain."""
    guidance: float = Field(default=1.0, ge=0, le=1000)
    """1 takes the class as it is; above, samples are pushed towards it, at twice the network evaluations."""
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1e9)], Annotated[float, Field(gt=0, le=1e9)]] | None = None
    """Guide only where the noise's standard deviation, beside data of variance one, is above the first and up to the second
    (Kynkäänniemi et al. 2024, arXiv:2404.07724); null: everywhere. sigma = exp(-log_snr / 2)."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights are scored."""
    extractors: tuple[ExtractorName, ...] = ("eurosat",)
    """Feature extractors; the first decides about promotion. eurosat: shipped, for EuroSAT. own: trained on the dataset itself.
    inception: the usual one."""
    choice_samples: int = Field(default=1000, ge=2, le=10**6)
    """Images by which each moving average is judged when one is chosen."""
    batch: int = Field(default=100, gt=0, le=2**16)
    """Images that the network sees at once. It belongs to the recipe: another batch may round differently."""


class Start(Part):
    """The checkpoint that training goes on from, with its optimiser's state, in place of new weights."""

    run: RunName
    """The run that made it."""
    step: int = Field(gt=0, le=IMAGES)
    """Its step; the images seen until then count as seen."""
    digest: Sha256
    """Of the checkpoint: another one under that name is refused."""


class Recipe(Part):
    """A whole recipe. `load_recipe` makes one from a preset and overrides."""

    name: str
    """The preset that it came from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of every random stream: order, noise, noise levels, initial weights. The parameter `seed` sets it, no file does."""
    data: Data
    network: Network = Network()
    process: Process = Process()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    ema: MovingAverage = MovingAverage()
    evaluation: Evaluation
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's activations; weights, losses and statistics are float32 or better."""
    reduction: Literal["exact", "fast"] = "exact"
    """How gradients are added. exact: along a fixed tree over the lanes; on CPUs, with one thread a process, the same bits
    on any number of processes that divides the lanes. fast: DistributedDataParallel's own order, which overlaps with the
    backward pass."""

    start: Start | None = None
    """Another run's checkpoint to go on from; null: new weights."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        data, network = self.data, self.network
        if data.batch_size % data.lanes:
            raise ValueError(f"data.batch_size {data.batch_size} is not a multiple of data.lanes {data.lanes}")
        if network.width * max(network.multipliers) > MOST_CHANNELS:
            raise ValueError(
                f"network.width {network.width} times {max(network.multipliers)} are more than {MOST_CHANNELS:,} channels"
            )
        if self.milestone_count > MOST_MILESTONES:
            raise ValueError(
                f"evaluation.every_images {self.evaluation.every_images:,} means {self.milestone_count:,} evaluations of "
                f"{data.images:,} images; {MOST_MILESTONES:,} are the most"
            )
        if data.lanes & (data.lanes - 1):
            raise ValueError(f"data.lanes {data.lanes} is not a power of two")
        smallest = network.patch * 2 ** (len(network.multipliers) - 1)
        if data.image_size % smallest:
            raise ValueError(
                f"data.image_size {data.image_size} can't be halved {len(network.multipliers) - 1} times after "
                f"patches of {network.patch}"
            )
        if network.kind == "seed" and data.lanes != 1:
            raise ValueError("network.kind seed has batch norm, which mixes the images of a batch: set data.lanes to 1")
        if network.kind == "seed" and network.class_conditional:
            raise ValueError("network.kind seed knows no classes: set network.class_conditional to false")
        if network.kind == "seed" and data.quarter_turns:
            raise ValueError("network.kind seed can't be told about turns: set data.quarter_turns to 0")
        if self.objective.alignment and network.kind == "seed":
            raise ValueError("network.kind seed has no middle to align: set objective.alignment to 0")
        if self.objective.alignment and self.aligned_with is None:
            raise ValueError(
                "objective.alignment needs two of evaluation.extractors, as [eurosat, own]: the first judges, and another, eurosat "
                "or own, is what the network is aligned with"
            )
        if network.kind == "seed" and self.learned_variance:
            raise ValueError("network.kind seed has no learned variances: set objective.loss to simple")
        if self.process.zero_terminal_snr and self.learned_variance:
            raise ValueError(
                "process.zero_terminal_snr needs objective.loss simple: the bound's last step is pure noise"
            )
        if len(set(map(round, self.ema.half_lives))) < len(self.ema.half_lives):
            raise ValueError("ema.half_lives names one twice, in whole images")
        interval = self.evaluation.guidance_interval
        if interval is not None and interval[0] >= interval[1]:
            raise ValueError("evaluation.guidance_interval must rise")
        if self.process.log_snr_min >= self.process.log_snr_max:
            raise ValueError("process.log_snr_min must lie below process.log_snr_max")
        if self.process.zero_terminal_snr and self.process.prediction == "epsilon":
            raise ValueError("process.zero_terminal_snr needs process.prediction v or x0: epsilon says nothing there")
        if self.process.zero_terminal_snr and self.evaluation.spacing != "uniform_time":
            raise ValueError(
                "process.zero_terminal_snr needs evaluation.spacing uniform_time: log_snr is infinite there"
            )
        if self.process.zero_terminal_snr and self.process.schedule == "cosine":
            raise ValueError(
                "process.zero_terminal_snr is for the discrete schedules; lower process.log_snr_min instead"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 of the recipe's canonical JSON; equal recipes train equal weights from equal data (and the same own extractor,
        if aligned with it)."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def learned_variance(self) -> bool:
        """Whether the network also says how noisy the reverse transitions are: with losses that can teach it."""
        return self.objective.loss != "simple"

    @property
    def aligned_with(self) -> ExtractorName | None:
        """The extractor whose features of clean images the network's middle foretells: never the first, which judges."""
        if not self.objective.alignment:
            return None
        return next((name for name in self.evaluation.extractors[1:] if name in ("eurosat", "own")), None)

    @property
    def needs_class(self) -> bool:
        """Whether the network was told the class of every image: without one it says nothing that it has learnt."""
        return self.network.class_conditional and self.network.label_dropout == 0

    @property
    def can_be_guided(self) -> bool:
        """Whether the network knows images of a class as well as images of any: guidance goes from these to those."""
        return self.network.class_conditional and self.network.label_dropout > 0

    @property
    def first_step(self) -> int:
        """The step that training begins after: 0, or that of the checkpoint it goes on from."""
        return self.start.step if self.start else 0

    @property
    def total_steps(self) -> int:
        """Optimiser steps in the whole training."""
        return -(-self.data.images // self.data.batch_size)

    @property
    def _milestone_steps(self) -> int:
        return max(1, round(self.evaluation.every_images / self.data.batch_size))

    @property
    def milestone_count(self) -> int:
        """At most so many milestones there are; counted, for recipes that have more than can be listed."""
        return -(-(self.total_steps - self.first_step) // self._milestone_steps)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The steps after which the model is evaluated, the last step among them."""
        every = self._milestone_steps
        inner = range(self.first_step + every, self.total_steps, every)
        # A last stretch of less than half a segment is not worth an evaluation of its own before it.
        return (*(step for step in inner if self.total_steps - step >= every / 2), self.total_steps)

    def stretch_start(self, until: int) -> int:
        """The step after which the stretch that ends at `until` begins: the milestone before it, or the first step."""
        return max((step for step in self.milestones if step < until), default=self.first_step)

    def continued(self, start: Start, before: Recipe) -> Recipe:
        """This recipe, going on from a checkpoint of the recipe `before` for `data.images` more images.

        Raises RecipeError that names what differs if the checkpoint's state has no place in it.
        """
        different = [name for name in STATE_DEPENDS_ON if _value(self, name) != _value(before, name)]
        if different:
            told = "; ".join(f"{name} is {_value(self, name)} here, {_value(before, name)} there" for name in different)
            raise RecipeError(f"The recipe can't go on from step {start.step} of {start.run}: {told}.")
        images = start.step * self.data.batch_size + self.data.images
        return self.model_copy(update={"start": start, "data": self.data.model_copy(update={"images": images})})

    def check_processes(self, processes: int) -> None:
        """Raises RecipeError if that many processes can't share the lanes evenly."""
        lanes = self.data.lanes
        if processes < 1 or lanes % processes:
            fitting = [count for count in range(1, lanes + 1) if lanes % count == 0]
            raise RecipeError(
                f"{processes} processes can't share the recipe's {lanes} lanes evenly. Use {', '.join(map(str, fitting))} "
                "processes, or another data.lanes (which makes it another recipe)."
            )


STATE_DEPENDS_ON = (
    "data.image_size",
    "data.batch_size",
    "data.quarter_turns",
    "network",
    "process",
    "objective.noise_levels",
    "learned_variance",
    "aligned_with",
    "optimizer.kind",
    "ema.half_lives",
)
"""What two recipes must have in common for the state of one to be one of the other."""


def _value(recipe: Recipe, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), recipe)


def flatten(recipe: Recipe) -> dict[str, str]:
    """The recipe as dotted keys and texts, in its own order."""
    flat: dict[str, str] = {}
    for name, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": _text(content) for inner, content in value.items()}
        else:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
