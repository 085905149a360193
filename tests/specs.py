"""Specs of images, for tests."""

from __future__ import annotations

from typing import Any

from diffusion.data.sources.eurosat import CLASSES, IMAGE_SIZE
from diffusion.data.spec import ImageSpec, band_names, shown_bands

HIGHEST = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


def spec(bands: int = 3, dtype: str = "uint8", size: int = IMAGE_SIZE, **fields: Any) -> ImageSpec:
    """Images of so many bands, by default with EuroSAT's classes."""
    names, high = band_names(bands), HIGHEST[dtype]
    values: dict[str, Any] = {
        "bands": names,
        "size": size,
        "dtype": dtype,
        "low": (0.0,) * bands,
        "high": (high,) * bands,
        "mean": (-0.3,) * bands,
        "std": (0.4,) * bands,
        "shown": shown_bands(names),
        "black": (0.0,) * 3,
        "white": (high,) * 3,
        "classes": CLASSES,
    }
    return ImageSpec.model_validate(values | fields)


RGB_SPEC = spec(mean=(-0.3, -0.2, -0.1), std=(0.4, 0.3, 0.2))
