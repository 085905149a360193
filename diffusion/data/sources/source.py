"""What every kind of source gives: its images, unread, in a fixed order, and the digest of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffusion.data.spec import LARGEST, MOST_BANDS, SMALLEST, Band
from diffusion.errors import DataError, RecipeError, nearest
from diffusion.trust.redaction import shown


class SourceOptions(BaseModel):
    """How the images of a source are meant. All but name and licence are part of the dataset's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    size: Annotated[int, Field(ge=SMALLEST, le=LARGEST)] | None = None
    """Height and width that images are brought to; null: what they have, which must be the same for all, and square."""
    fit: Literal["crop", "stretch"] | None = None
    """How images of another shape are brought to that size: crop takes the largest square in the middle, stretch all of it."""
    bands: tuple[Band, ...] | None = Field(default=None, min_length=1, max_length=MOST_BANDS)
    """Names of the bands, in the files' order."""
    shown: tuple[Band, Band, Band] | None = None
    """The bands that pictures show as red, green and blue."""
    levels: tuple[float, float] | None = None
    """The levels that -1 and 1 mean, for all bands; null: 0 to 255 of 8-bit images, and of others what all but 1 pixel of
    2000 have at either end, by band."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an image that does not decode does: end the run, or be left out and counted."""
    most_skipped: float = Field(default=0.01, ge=0, le=1)
    """The share of images that may be left out."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,39}$")] | None = None
    """The dataset's name, and its models'; null: that of the folder or file."""
    licence: Annotated[str, Field(max_length=500)] = "not stated"
    """What the model's card says of the images' licence."""

    @model_validator(mode="after")
    def _check(self) -> SourceOptions:
        if self.fit and not self.size:
            raise ValueError("fit says how images are brought to a size: name the size as well")
        if self.levels and self.levels[0] >= self.levels[1]:
            raise ValueError("levels must rise")
        if self.shown and self.bands and not set(self.shown) <= set(self.bands):
            raise ValueError("shown names a band that bands does not")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What differs from the default and changes the dataset."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"name", "licence"})


AS_IT_IS = SourceOptions()
"""No option named."""


def parse_options(values: dict[str, Any]) -> SourceOptions:
    """The options that a user named. Raises RecipeError, with the nearest valid name where one is misspelt."""
    for name in values:
        if name not in SourceOptions.model_fields:
            known = list(SourceOptions.model_fields)
            raise RecipeError(f"There is no source option '{shown(str(name))}': {nearest(str(name), known)}")
    try:
        return SourceOptions.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}".removeprefix(": ") for p in error.errors())
        raise RecipeError(f"The source options can't be used: {problems}.") from error


@dataclass(frozen=True)
class SourceImage:
    """One image of a source. Its content is read when it is needed: a source can be larger than memory."""

    class_name: str
    """Empty if the images have no classes."""
    file_name: str
    sha256: str
    """Of its content."""
    size: int
    """Of its content, in bytes."""
    read: Callable[[], bytes] = field(compare=False, repr=False)

    @classmethod
    def of(cls, class_name: str, file_name: str, content: bytes, read: Callable[[], bytes]) -> SourceImage:
        """The image of this content, which `read` will give again."""
        return cls(class_name, file_name, hashlib.sha256(content).hexdigest(), len(content), read)

    @property
    def path(self) -> str:
        """What people know it by: its class, if it has one, and its file's name."""
        return f"{self.class_name}/{self.file_name}" if self.class_name else self.file_name


@dataclass(frozen=True)
class Source:
    """All images of a source, sorted by class and file name, with the digest of their content."""

    name: str
    licence: str
    images: tuple[SourceImage, ...]
    digest: str
    options: SourceOptions = AS_IT_IS
    classes: tuple[str, ...] = ()
    """Their names, in the order of the labels."""


def make_source(
    name: str,
    licence: str,
    images: Iterable[SourceImage],
    options: SourceOptions = AS_IT_IS,
    classes: tuple[str, ...] | None = None,
) -> Source:
    """A source of these images. Raises DataError if two of a class have the same name, whatever their kind, or one is no text.

    Args:
        classes: their names in order, where that is not the alphabet's.
    """
    found = tuple(sorted(images, key=lambda image: (image.class_name, image.file_name)))
    seen = set[tuple[str, str]]()
    for image in found:
        _check_names(name, image)
        key = (image.class_name, image.file_name.rpartition(".")[0])
        if key in seen:
            raise DataError(f"{name} holds two images {shown('/'.join(key).lstrip('/'))}. Keep one, or rename it.")
        seen.add(key)
    if classes is None:
        classes = tuple(sorted({image.class_name for image in found if image.class_name}))
    return Source(name, licence, found, content_digest(found, options), options, classes)


def _check_names(name: str, image: SourceImage) -> None:
    """Names are lines of what the digest is made of: each must be one, in UTF-8."""
    try:
        image.path.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds a name that is not UTF-8: {shown(image.path)}. Rename it.") from None
    if "\n" in image.path:
        raise DataError(f"{name} holds a name with a line break: {shown(image.path)}. Rename it.")


def content_digest(images: tuple[SourceImage, ...], options: SourceOptions = AS_IT_IS) -> str:
    """sha256 over the lines `<class>/<file name> <sha256 of the file>`, sorted by name: the same for every container.

    Options that change what is made of the images are a last line.
    """
    lines = sorted(f"{image.class_name}/{image.file_name} {image.sha256}\n" for image in images)
    digest = hashlib.sha256("".join(lines).encode())
    if options.identity:
        digest.update(json.dumps(options.identity, sort_keys=True).encode())
    return digest.hexdigest()
