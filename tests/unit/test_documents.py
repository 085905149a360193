"""README and docs: short enough to be read, and no link that leads nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [
    PROJECT / "README.md",
    PROJECT / "SECURITY.md",
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "CHANGELOG.md",
    PROJECT / "tests/README.md",
    *sorted((PROJECT / "docs").glob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """What a link into the page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", page.read_text()):
        if target and not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            where = (page.parent / target) if target else page
            assert anchor in anchors(where), f"{page.name} links to {target}#{anchor}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 120


def test_the_site_is_built_of_all_pages_and_no_link_of_it_leads_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*(tmp_path / "site").glob("*.html")]) == len(PAGES) + 1  # and that of what is not found
    for page in (tmp_path / "site").glob("*.html"):
        if page.name != "404.html":  # which may be shown anywhere
            for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
                if not target.startswith(("http:", "https:", "data:", "mailto:")):
                    assert (page.parent / unquote(target)).exists(), f"{page.name} leads to {target}"
    first = (tmp_path / "site/index.html").read_text()
    assert 'src="overnight-samples.jpg"' in first
    assert (tmp_path / "site/overnight-samples.jpg").exists()
    assert "https://fonts." not in first


def test_every_setting_is_on_the_page_of_operations() -> None:
    from diffusion.settings import Settings

    page = (PROJECT / "docs/operations.md").read_text()
    assert [name for f in Settings.model_fields.values() if (name := str(f.validation_alias)) not in page] == []


def test_the_page_of_the_recipe_is_that_of_its_schema() -> None:
    from diffusion.presentation.recipe_page import recipe_page

    assert (PROJECT / "docs/recipe.md").read_text() == recipe_page(), (
        "python -m diffusion.presentation.recipe_page > docs/recipe.md"
    )
