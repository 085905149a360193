"""The engines by their names; TRAIN_DIFFUSION_ENGINE chooses one."""

from __future__ import annotations

from diffusion.settings import settings
from flows.engines.engine import Engine
from flows.engines.local import Local
from flows.engines.ray_cluster import RayCluster

ENGINES: dict[str, Engine] = {"local": Local(), "ray": RayCluster()}


def engine() -> Engine:
    """The one that the environment chooses."""
    return ENGINES[settings().engine]
