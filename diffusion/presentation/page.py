"""An HTML page of pictures and tables that needs nothing else, light or dark as its reader's system is, on any width."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from diffusion.presentation.templates import template


@dataclass(frozen=True)
class Picture:
    """A picture with what there is to say about it."""

    caption: str
    data: bytes
    """PNG or WebP."""

    @property
    def url(self) -> str:
        """All of it, as an address."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "webp"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page: pictures, or rows of a table with its head first."""

    title: str
    text: str
    pictures: tuple[Picture, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    series: bool = False
    """Whether the pictures follow one another, to be moved through, and do not stand side by side."""


def page(title: str, lead: str, sections: list[Section]) -> str:
    """The whole page. Everything is escaped; pictures are part of it."""
    return template("page.html").render(title=title, lead=lead, sections=sections)
