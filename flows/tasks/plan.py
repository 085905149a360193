"""What is to be trained: from new weights or from the champion's, and whether it has been done already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from diffusion.data.manifest import Manifest
from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.store.objects import Store, open_store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.promotion import champion_version
from diffusion.tracking.registry import model_name
from diffusion.tracking.run import finished_run, recorded_start
from diffusion.tracking.version_tags import start_at
from diffusion.training.state import load_state
from flows.code import git_commit
from flows.progress import say
from flows.request import TrainingRequest
from flows.tasks.retrying import RETRIED

if TYPE_CHECKING:
    from mlflow import MlflowClient


@task(
    name="plan",
    task_run_name="plan",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def plan(request: TrainingRequest, recipe: Recipe, dataset: Manifest) -> tuple[Recipe, str | None]:
    """The recipe, going on from the champion where that was asked for; and the finished run that has done the same.

    Raises RecipeError if the champion's state has no place in the recipe, or the champion knows another dataset.
    """
    client, experiment_id = open_tracking(settings())
    if request.start_from == "champion":
        recipe = _from_champion(client, open_store(settings().store_uri), experiment_id, recipe, dataset)
    same = finished_run(client, experiment_id, recipe, dataset, git_commit()) if request.skip_unchanged else None
    return recipe, same


def _from_champion(client: MlflowClient, store: Store, experiment_id: str, recipe: Recipe, dataset: Manifest) -> Recipe:
    # A retry goes on as it began, though there may be another champion by now.
    begun, start = recorded_start(client, experiment_id, str(runtime.flow_run.id))
    if not begun:
        champion = champion_version(client, model_name(client, store, dataset, recipe.data.image_size))
        if champion is not None:
            start = start_at(champion)
            say(f"Going on from version {champion.version}, the champion: step {start.step:,} of {start.run}.")
    if start is None:
        say("There is no champion to go on from: beginning with new weights.")
        return recipe
    state = load_state(store, start.run, start.step)
    if state.dataset != dataset.digest:
        raise RecipeError(
            f"The champion ({start.run}) was trained on dataset {state.dataset[:16]}, and this one is {dataset.digest[:16]}: its "
            "weights mean other pixels. Train with start_from: scratch once."
        )
    return recipe.continued(start, state.recipe)


def unchanged(run: str) -> State[None]:
    """The end of a flow run whose work has been done before."""
    message = f"Unchanged: the finished run {run} has the same dataset, recipe, code and seed."
    say(message)
    return Completed(name="Skipped", message=message)
