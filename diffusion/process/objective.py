"""Training objectives, as functions of what the network says: the simple loss with its weights, the bound, their sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.choices import Error, Loss, Prediction, Weighting
from diffusion.process.prediction import loss_weight
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


def simple_loss(output: Tensor, aim: Tensor, weights: Tensor, error: Error = "squared") -> Tensor:
    """The error of the network's output, averaged over bands and pixels and weighted: [batch], float32 or better.

    Ho et al. 2020, eq. 14, for any prediction: `aim` is what `prediction.target` gives, and `weights`, [batch], what `weight` does.
    """
    difference = output.to(torch.promote_types(output.dtype, torch.float32)) - aim
    elementwise = difference.square() if error == "squared" else difference.abs()
    per_image = elementwise.flatten(1).mean(1)
    return per_image * weights.to(per_image)


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, [batch] each."""

    weighted: Tensor
    """To be averaged and lowered."""
    own: Tensor
    """What each image's loss is at its noise level, whatever that level's chances were."""


def with_bound(
    loss: Loss, simple: Tensor, bound: Tensor, odds: Tensor, bound_weight: float, unweight_simple: bool
) -> Losses:
    """Losses of images whose step of the chain was drawn `odds` times as often as if all steps were as likely, each [batch].

    vlb: the bound, divided by the odds. hybrid: simple + bound_weight * bound (Nichol & Dhariwal 2021, eq. 16).

    Args:
        bound: the whole bound as each image's step tells it: steps times its term, nats a dimension.
        unweight_simple: divide the simple loss by the odds as well, to mean what steps drawn evenly mean; else the way in
            which steps are drawn is part of what it means.
    """
    unweight = 1 / odds
    if loss == "vlb":
        return Losses((bound * unweight).to(simple), bound.to(simple))
    simple_weight = unweight if unweight_simple else torch.ones_like(unweight)
    scaled = bound_weight * bound if loss == "hybrid" else torch.zeros_like(bound)
    return Losses((simple * simple_weight + scaled * unweight).to(simple), (simple + scaled).to(simple))
