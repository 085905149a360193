"""An HTML page of pictures and tables that needs nothing else, light or dark as its reader's system is, on any width."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --paper: #fff; --ink: #1d2430; --soft: #5c6675; --line: #dde1e7; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14181f; --ink: #e6e9ee; --soft: #9aa4b2; --line: #2e3540; }} }}
body {{ margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }}
p, figcaption {{ color: var(--soft); margin: .25rem 0 .75rem; max-width: 60rem; }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }}
.series {{ display: flex; gap: 1rem; overflow-x: auto; scroll-snap-type: x mandatory; padding-bottom: .5rem; }}
.series figure {{ flex: 0 0 min(100%, 44rem); scroll-snap-align: start; }}
.pair {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }}
</style>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A picture with what there is to say about it."""

    caption: str
    data: bytes
    """PNG or WebP."""


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
    body = "\n".join(_section(section) for section in sections if section.pictures or section.rows)
    return PAGE.format(title=html.escape(title), lead=html.escape(lead), body=body)


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
    if section.pictures:
        figures = "".join(map(_figure, section.pictures))
        parts.append(f'<div class="{"series" if section.series else "pair"}">{figures}</div>')
    if section.rows:
        head, *rows = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(("th", *["td"] * len(section.rows)), section.rows, strict=False)
        )
        table = "".join(f"<tr>{row}</tr>" for row in (head, *rows))
        parts.append(f'<div class="table"><table>{table}</table></div>')
    return "".join([*parts, "</section>"])


def _figure(picture: Picture) -> str:
    kind = "png" if picture.data.startswith(b"\x89PNG") else "webp"
    data = base64.b64encode(picture.data).decode()
    caption = html.escape(picture.caption)
    return f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}"><figcaption>{caption}</figcaption></figure>'
