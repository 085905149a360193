"""The pages at the project's root, as pages of the site (mkdocs.yml): README is its first."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
AT_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "tests/README.md": "tests.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, with links that lead where the pages of docs/ are in the site."""
    for path, name in AT_THE_ROOT.items():
        text = (PROJECT / path).read_text(encoding="utf-8")
        for other, place in AT_THE_ROOT.items():
            text = text.replace(f"]({other})", f"]({place})")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from docs/ to them."""
    for path, place in AT_THE_ROOT.items():
        markdown = markdown.replace(f"](../{path})", f"]({place})")
    return markdown
