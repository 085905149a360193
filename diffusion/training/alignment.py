"""Representation alignment: from its middle, the network also foretells what a trained one sees in the clean image.

Yu et al. 2025 (arXiv:2410.06940, eq. 8), with one layer as the head: what is foretold is as coarse as the middle itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.errors import RecipeError
from diffusion.features.classifier import FEATURES
from diffusion.features.extractor import Teacher
from diffusion.model.unet import UNet
from diffusion.randomness import stream


class Aligned(nn.Module):
    """A U-Net with the head that reads its middle while it is trained, and that no sample needs.

    Args:
        seed: key of the head's initial weights.
    """

    def __init__(self, network: UNet, teacher: Teacher, seed: int) -> None:
        super().__init__()
        self.network, self.teacher = network, teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(seed, "alignment").integers(2**63)))
            self.alignment = nn.Conv2d(network.middle_channels, FEATURES, 1)

    def forward(
        self, x: Tensor, noise_variance: Tensor, label: Tensor | None = None, turn: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the network says, and the features that its middle foretells: [batch, features, ...] of the middle's size."""
        condition = self.network.condition(noise_variance, label, turn)
        middle, skips = self.network.to_middle(x, condition)
        return self.network.from_middle(middle, skips, condition), self.alignment(middle)

    def misalignment(self, foretold: Tensor, x0: Tensor) -> Tensor:
        """How far that is from what the teacher sees: 1 - cosine, averaged over places, in [0, 2]: [batch], float32."""
        seen = self.teacher.see(x0)
        if seen.shape[-2:] != foretold.shape[-2:]:
            seen = F.interpolate(seen, foretold.shape[-2:], mode="bilinear", antialias=True)
        return 1 - F.cosine_similarity(foretold.float(), seen, dim=1).mean(dim=(1, 2))

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it beside the network: the head, and which teacher it has learned from."""
        teacher = torch.tensor(list(bytes.fromhex(self.teacher.sha256)), dtype=torch.uint8)
        return {"teacher": teacher, **self.alignment.state_dict()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there. Raises RecipeError if the teacher was another one."""
        if bytes(state["teacher"].tolist()).hex() != self.teacher.sha256:
            raise RecipeError(
                "The network was aligned with another extractor than the dataset's own of today, which has been trained anew: "
                "start a new run, from scratch, with another seed or recipe."
            )
        self.alignment.load_state_dict({name: value for name, value in state.items() if name != "teacher"})
