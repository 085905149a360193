"""Where MLflow's pages of ours are, and the table of runs that the experiment brings: a bare address opens other pages."""

from __future__ import annotations

import json
from collections.abc import Sequence

from diffusion.trust.reading import parse_json

MODE = "workflowType=machine_learning"
"""Without it MLflow opens an experiment as one of language models, where nothing of ours is."""
VIEW = "train-diffusion"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Of the experiment: the view, as MLflow's own button for sharing one keeps it."""
MOST = 40
"""Columns of figures: each dataset may bring its own."""
AT_THE_BEGINNING, AT_THE_END = ("tags.`promotion`",), ("params.`data.images`", "params.`name`", "attributes.`Duration`")
"""Columns before and after the figures."""


def runs_page(experiment_id: str) -> str:
    """Of all runs, with their figures; relative to the server's address."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&{MODE}"


def run_page(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Of one run, or of one of its artifacts; relative to the server's address."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{f'/artifacts/{artifact}' if artifact else ''}?{MODE}"


def shared_view(before: str | None = None, figures: Sequence[str] = ()) -> str:
    """The table of runs: the newest first, how each ended, its figures, and what they cost.

    Args:
        before: the view as it was, whose figures stay.
        figures: metrics that have a column now.
    """
    columns = [f"metrics.`{name}`" for name in figures]
    shown = [column for column in _columns(before) if column.startswith("metrics.`") and column not in columns]
    shown += columns  # the newest: where there are too many, the oldest go
    return json.dumps(
        {
            "searchFilter": "",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": [*AT_THE_BEGINNING, *shown[-MOST:], *AT_THE_END],
            "runsExpanded": {},
            "runsPinned": [],
            "runsHidden": [],
            "runListHidden": False,
            "viewMaximized": True,
            "groupBy": None,
        }
    )


def _columns(view: str | None) -> list[str]:
    try:
        found = parse_json(view or "{}")["selectedColumns"]
        return [str(column) for column in found] if isinstance(found, list) else []
    except (ValueError, TypeError, LookupError):  # somebody has changed it
        return []
