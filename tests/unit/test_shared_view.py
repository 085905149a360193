"""The table of runs that links open: whatever figures come and go, those of the newest run have columns."""

from __future__ import annotations

import json

from diffusion.tracking.pages import MOST, shared_view


def figures(view: str) -> list[str]:
    return [name for name in json.loads(view)["selectedColumns"] if name.startswith("metrics.")]


def test_the_newest_figures_always_have_columns() -> None:
    view = shared_view()
    for night in range(60):
        view = shared_view(view, [f"score/fid_own-{night}", "score/bits_per_dim"])
        assert figures(view)[-2:] == [f"metrics.`score/fid_own-{night}`", "metrics.`score/bits_per_dim`"]
    assert len(figures(view)) == len({*figures(view)}) == MOST
    assert figures(shared_view("no view", ["a"])) == ["metrics.`a`"]
