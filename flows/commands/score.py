"""Score a model again, in another way, or beside another one: no training is repeated.

python -m flows.commands.score MODEL [--set guidance=2 …] [--against MODEL] [--processes 2]

MODEL is a version, as eurosat-ddpm@champion or eurosat-ddpm/3, or a run by the name of its folder in the store's `checkpoints/`.
--set replaces values of the recipe's part `evaluation`. Two models are scored alike, from the same noise, and compared as a promotion
compares them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from diffusion.data.manifest import Manifest, find_dataset
from diffusion.errors import DataError
from diffusion.evaluation.comparison import Difference, compare, load_evidence
from diffusion.evaluation.figures import number, table
from diffusion.evaluation.reference import Reference
from diffusion.evaluation.scores import Scores, find_scores
from diffusion.jobs.specs import JobSpec
from diffusion.recipe import Recipe
from diffusion.recipe_files import with_evaluation
from diffusion.settings import Settings
from diffusion.store import layout
from diffusion.store.objects import Store, open_store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.loading import find_version
from diffusion.tracking.promotion import Scored
from diffusion.tracking.version_tags import checkpoint_of
from diffusion.training.state import CheckpointState, load_state, steps_with_checkpoint
from flows.commands.command import run_command, take_values, values_of
from flows.engines.local import Local, usable_processes
from flows.launcher import Listener, run_job
from flows.references import load_deciding_reference, missing_references
from flows.rescoring import score_as


@dataclass(frozen=True)
class Subject:
    """A model that is scored."""

    name: str
    """As it was asked for."""
    state: CheckpointState
    """Its checkpoint's."""


def main() -> int:
    """Returns 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    take_values(parser, "replace a value of the recipe's part evaluation")
    parser.add_argument("--against", metavar="MODEL")
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    values = values_of(parser, arguments)

    def score(environment: Settings) -> int:
        scorer = Scorer(environment, arguments.processes)
        first = scorer.find(arguments.model)
        recipe = with_evaluation(first.state.recipe, values)
        asked, own = recipe.evaluation, first.state.recipe.evaluation
        scorer.chooses = (asked.weights, asked.choice_samples) != (own.weights, own.choice_samples)
        dataset = scorer.dataset(first)
        scored = scorer.score(first, recipe, dataset)
        print_figures(first.name, scored.scores)
        print(
            f"\nsamples: {scorer.store.uri}/{layout.picture(scored.run, first.state.step, 'grid', scored.evaluation)}"
        )
        if arguments.against:
            second = scorer.find(arguments.against)
            other = scorer.score(second, recipe, dataset)
            print_figures(second.name, other.scores)
            scorer.compare((first, scored), (second, other), load_deciding_reference(recipe, dataset, environment))
        return 0

    return run_command(score)


class Scorer:
    """Scores models of a store."""

    def __init__(self, environment: Settings, processes: int | None) -> None:
        self.environment, self.processes = environment, processes
        self.chooses = False
        """Whether weights are chosen by the recipe that is asked for; else they are those that a model was scored with."""
        self.store: Store = open_store(environment.store_uri)

    def find(self, name: str) -> Subject:
        """The model of that name. Raises TrackingError or DataError if there is none."""
        if "@" in name or "/" in name:
            client, _ = open_tracking(self.environment)
            return Subject(name, checkpoint_of(find_version(client, name), self.store))
        steps = steps_with_checkpoint(self.store, name)
        if not steps:
            raise DataError(
                f"The store {self.store.uri} has no checkpoint of a run {name}. Versions are named eurosat-ddpm@champion or "
                "eurosat-ddpm/3."
            )
        return Subject(name, load_state(self.store, name, max(steps)))

    def dataset(self, subject: Subject) -> Manifest:
        """What a model was trained on. Raises DataError if it is gone."""
        dataset = find_dataset(self.store, subject.state.dataset)
        if dataset is None:
            raise DataError(f"The store {self.store.uri} lacks the dataset {subject.state.dataset} of {subject.name}.")
        return dataset

    def score(self, subject: Subject, recipe: Recipe, dataset: Manifest) -> Scored:
        """The scores of a model by a recipe's evaluation on a dataset: those that are there, or made now."""
        for missing in missing_references(recipe, dataset, self.environment):
            self._run(missing.job, recipe)
        state = subject.state
        own = find_scores(self.store, state.run, state.step, state.recipe.evaluation.samples, checkpoint=state.digest)
        weights = own.weights if own and not self.chooses else None
        return score_as(state, recipe, dataset, weights, self.environment, lambda job: self._run(job, recipe))

    def _run(self, spec: JobSpec, recipe: Recipe) -> None:
        processes, threads = usable_processes(recipe, self.processes), Local().threads(recipe)
        said: list[str] = []

        def told(progress: dict[str, object]) -> None:
            if (stage := str(progress["stage"])) not in said:
                said.append(stage)
                print(f"{stage} …", file=sys.stderr, flush=True)

        folder = self.environment.runs / "scored" / spec.run
        run_job(spec.MODULE, spec, folder, processes, Listener(on_progress=told), threads)

    def compare(self, new: tuple[Subject, Scored], old: tuple[Subject, Scored], reference: Reference) -> None:
        """Print by how much the first is off from the second. Raises DataError where one is not at its training's end."""
        for subject, scored in (new, old):
            if scored.scores.evidence_sha256 is None:
                raise DataError(
                    f"{subject.name} is not at its training's end: only there is kept what models are compared by."
                )
        first, second = (load_evidence(self.store, by.run, by.scores, by.evaluation) for _, by in (new, old))
        found = compare(first, second, reference)
        print(f"\n{new[0].name} less {old[0].name}, sample by sample, with the 95 % interval; lower is better:")
        # Bits of images given their class, and bits of images, are no one figure.
        alike = new[0].state.recipe.needs_class == old[0].state.recipe.needs_class
        for name, one in (
            ("fid", found.fid),
            ("bits_per_dim", found.bits_per_dim if alike else None),
            ("memorisation", found.memorisation),
        ):
            if one is not None:
                print(f"{name:>14}  {_said(one)}")


def _said(one: Difference) -> str:
    verdict = "lower" if one.high < 0 else "higher" if one.low > 0 else "as far as can be told, alike"
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f}): {verdict}"


def print_figures(title: str, scores: Scores) -> None:
    """All figures, with their errors and what real images have."""
    rows = [
        (
            name,
            number(value) + ("" if error is None else f" ± {error:.2g}"),
            number(real),
        )
        for name, value, error, real in table(scores)
    ]
    width, middle = max(len(name) for name, _, _ in rows), max(len(value) for _, value, _ in rows)
    print(f"\n{title}: {scores.weights} after {scores.images_seen:,} images\n")
    print(f"{'':>{width}}  {'':{middle}}  real images")
    for name, value, real in rows:
        print(f"{name:>{width}}  {value:{middle}}  {real}")


if __name__ == "__main__":
    sys.exit(main())
