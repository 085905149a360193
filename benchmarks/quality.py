"""Recipe against recipe at the same cost: the seed's and the default one, on real EuroSAT.

    python -m benchmarks.quality --budget small --seeds 0 1

Same image size, same number of images seen, networks of about the same FLOPs an image (counted, and shown). Each recipe is
scored at its best: raw or averaged weights. Writes `quality.json`, `quality-table.md`, `quality.png` and a grid of each recipe
into the output folder, and keeps its trainings under TRAIN_DIFFUSION_HOME: begun again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.data.ingest import ingest
from diffusion.data.manifest import Manifest
from diffusion.data.sources.find import EUROSAT, find_archive, read_source
from diffusion.data.spec import ImageSpec
from diffusion.denoiser import build_network
from diffusion.evaluation.figures import FIGURES, with_error
from diffusion.evaluation.scores import DEVIATIONS, Row, Scores, find_scores
from diffusion.features.identity import SHIPPED_SHA256
from diffusion.jobs.specs import EvaluationJob, JobSpec, ReferenceJob, TrainingJob
from diffusion.recipe import Evaluation, Recipe
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store import layout
from diffusion.store.objects import open_store
from diffusion.training.state import steps_with_checkpoint
from flows.engines.local import usable_processes
from flows.launcher import Listener, run_job


@dataclass(frozen=True)
class Budget:
    """What both recipes may spend."""

    image_size: int
    images: int
    samples: int
    likelihood_images: int
    preset: str
    """The default recipe of that size."""
    default: dict[str, Any]
    """Its network's size here: about the seed network's FLOPs."""


BUDGETS = {
    "small": Budget(32, 40_960, 1_000, 400, "demo", {"network.width": 32, "network.multipliers": [1, 2, 4]}),
    "full": Budget(
        64,
        2_430_000,
        10_000,
        2_700,
        "eurosat",
        {
            "network.width": 40,
            "network.multipliers": [1, 2, 2, 2],
            "network.patch": 1,
            "data.batch_size": 128,
            "data.lanes": 1,
        },
    ),
}


@dataclass(frozen=True)
class Arm:
    """One training, and the ways in which it is scored."""

    name: str
    recipe: Recipe
    evaluations: dict[str, Evaluation]


def arms(budget: Budget, seed: int) -> list[Arm]:
    """The seed's recipe, the default one, and the default one at a quarter of the images."""
    common = {
        "data.image_size": budget.image_size,
        "evaluation.every_images": 10**10,
        "evaluation.samples": budget.samples,
        "evaluation.likelihood_images": budget.likelihood_images,
    }
    # One lane is one process: `fast` lets it use all cores, where `exact` would keep it to one thread.
    old = load_recipe("seed", common | {"data.images": budget.images, "reduction": "fast"}, seed)
    made = [Arm("seed", old, {w: old.evaluation.model_copy(update={"weights": w}) for w in ("raw", "ema")})]
    for name, images in (("default", budget.images), ("default at a quarter", budget.images // 4)):
        new = load_recipe(budget.preset, common | budget.default | {"data.images": images}, seed)
        if new.evaluation.guidance != 1:
            made.append(Arm(name, new, {"own": new.evaluation}))
        made.append(Arm(f"{name}, unguided", new, {"unguided": replaced(new.evaluation, guidance=1.0)}))
    return made


SHOWN = ("fid", "kid", "bits_per_dim", "recall", "memorisation")


def replaced(evaluation: Evaluation, **values: Any) -> Evaluation:
    """The evaluation with other values."""
    return evaluation.model_copy(update=values)


def evaluations_a_sample(evaluation: Evaluation, recipe: Recipe) -> int:
    """Times that the network is asked for one sample: twice a step where it is guided."""
    guided = evaluation.guidance != 1 and recipe.network.class_conditional
    return evaluation.sampler_steps * (2 if guided else 1)


def compare_samplers(bench: Bench, arm: Arm, samples: int) -> dict[str, Scores]:
    """The default's 20 steps against 1000 of the learned chain, with the same weights, labels and numbers, unguided."""
    few = replaced(arm.recipe.evaluation, guidance=1.0, samples=samples, likelihood_images=2, likelihood_timesteps=1)
    chain = replaced(few, sampler="ancestral", sampler_steps=1000, spacing="uniform_time")
    return bench.score(Arm(arm.name, arm.recipe, {"20-dpmpp": few, "1000-ancestral": chain}))


def gigaflops(recipe: Recipe, spec: ImageSpec) -> float:
    """Of one forward pass for one image."""
    network, size = build_network(recipe, spec).eval(), recipe.data.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, len(spec.bands), size, size), torch.tensor([0.5], dtype=torch.float64), None)
    return counter.get_total_flops() / 1e9


class Bench:
    """Runs trainings and evaluations in the store of the environment."""

    def __init__(self) -> None:
        self.environment = settings()
        self.store = open_store(self.environment.store_uri)
        self.dataset = self._dataset()

    def _dataset(self) -> Manifest:
        return ingest(read_source(EUROSAT, find_archive(EUROSAT, self.environment)), self.store)

    def _common(self, run: str) -> dict[str, Any]:
        shards = self.environment.shard_copies
        return {"run": run, "store": self.environment.store_uri, "dataset": self.dataset.digest, "shard_copies": shards}

    def _job(self, spec: JobSpec, name: str, processes: int) -> None:
        say: Callable[[str], None] = lambda line: print(f"  {line}", flush=True) if "] step " in line else None  # noqa: E731
        run_job(spec.MODULE, spec, self.environment.runs / "benchmarks" / name, processes, Listener(on_line=say))

    def reference(self, image_size: int) -> None:
        """Measure the real images, once."""
        if not self.store.names(layout.reference(self.dataset.digest, "eurosat", SHIPPED_SHA256, image_size)):
            spec = ReferenceJob(**self._common("reference"), image_size=image_size, extractor="eurosat")
            self._job(spec, f"reference-{image_size}", 1)

    def score(self, arm: Arm) -> dict[str, Scores]:
        """Train the arm, unless that is done, and score it in each of its ways."""
        run = f"benchmark-{arm.recipe.digest[:16]}"
        processes, last = usable_processes(arm.recipe, None), arm.recipe.total_steps
        if last not in steps_with_checkpoint(self.store, run):
            spec = TrainingJob(**self._common(run), recipe=arm.recipe, until=last, checkpoint_every=10**9)
            self._job(spec, run, processes)
        found = {}
        for name, evaluation in arm.evaluations.items():
            scores = find_scores(self.store, run, last, evaluation.samples, name)
            if scores is None:
                job = EvaluationJob(**self._common(run), step=last, evaluation=evaluation, name=name)
                self._job(job, f"{run}-{name}", usable_processes(arm.recipe, None))
                scores = find_scores(self.store, run, last, evaluation.samples, name)
                assert scores is not None
            found[name] = scores
        return found

    def grid(self, arm: Arm, name: str) -> bytes:
        """The grid of one evaluation."""
        run = f"benchmark-{arm.recipe.digest[:16]}"
        return self.store.read(layout.picture(run, arm.recipe.total_steps, "grid", name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--chain-samples", type=int, default=0, help="compare samplers instead, on so many samples")
    arguments = parser.parse_args()
    budget, bench = BUDGETS[arguments.budget], Bench()
    bench.reference(budget.image_size)
    arguments.output.mkdir(parents=True, exist_ok=True)

    if arguments.chain_samples:
        (arm,) = (arm for arm in arms(budget, arguments.seeds[0]) if arm.name == "default")
        for name, scores in compare_samplers(bench, arm, arguments.chain_samples).items():
            fid, kid = with_error(scores.require("fid")), with_error(scores.require("kid"))
            print(f"{name}: fid {fid}, kid {kid}, n = {scores.samples}")
        return
    rows = []
    for seed in arguments.seeds:
        for arm in arms(budget, seed):
            print(f"{arm.name}, seed {seed}", flush=True)
            scored = bench.score(arm)
            best = min(scored, key=lambda name: scored[name].require("fid").value)
            rows.append(
                {
                    "recipe": arm.name,
                    "seed": seed,
                    "weights": "raw" if scored[best].weights == "model" else "ema",
                    "images": arm.recipe.data.images,
                    "evaluations": evaluations_a_sample(arm.evaluations[best], arm.recipe),
                    "gflop": gigaflops(arm.recipe, bench.dataset.images),
                    "bits_per_dim": min(scores.bound.total for scores in scored.values() if scores.bound is not None),
                    "scores": scored[best],
                }
            )
            print(
                f"  fid {scored[best].require('fid').value:.2f} ({best}), bits/dim {rows[-1]['bits_per_dim']:.3f}",
                flush=True,
            )
            if seed == arguments.seeds[0]:
                (arguments.output / f"quality-{arm.name.replace(',', '').replace(' ', '-')}.png").write_bytes(
                    bench.grid(arm, best)
                )
    (arguments.output / "quality.json").write_text(
        json.dumps(rows, indent=1, default=lambda scores: scores.model_dump(mode="json")) + "\n"
    )
    (arguments.output / "quality-table.md").write_text(table(rows, arguments.budget))
    figure(rows, arguments.output / "quality.png")
    print((arguments.output / "quality-table.md").read_text())


def table(rows: list[dict[str, Any]], budget: str) -> str:
    """The rows as Markdown: means over the seeds, with the larger of the seeds' spread and the bootstrap error."""
    lines = [
        f"Budget `{budget}`. FID and KID by the `eurosat` extractor; ± is the larger of the standard deviation over seeds and the",
        "bootstrap error of one. Weights: whichever of raw and averaged scored better.",
        "",
        "| recipe | seeds | images seen | GFLOP an image | evaluations a sample "
        "| fid_eurosat | kid_eurosat | bits/dim | recall | memorisation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        first = own[0]
        figures = {name: [row["scores"].require(name) for row in own] for name in SHOWN}
        figures["bits_per_dim"] = [
            row["scores"].require("bits_per_dim").model_copy(update={"value": row["bits_per_dim"]}) for row in own
        ]
        cells = [spread(figures[name]) for name in SHOWN]
        weights = "/".join(sorted({row["weights"] for row in own}))
        lines.append(
            f"| {name} ({weights}) | {len(own)} | {first['images']:,} | {first['gflop']:.2f} | {first['evaluations']} | "
            + " | ".join(cells)
            + " |"
        )
    scores = rows[0]["scores"]
    lines += [
        "",
        f"Real test images in place of samples: fid_eurosat {scores.require('fid').real:.2f} (n = {scores.real_samples:,}).",
    ]
    return "\n".join(lines) + "\n"


def spread(rows: list[Row]) -> str:
    """Mean of a figure, and its uncertainty where it has one."""
    values, errors = [row.value for row in rows], [row.error for row in rows if row.error is not None]
    digits = FIGURES[rows[0].figure].digits
    if not errors:
        return f"{np.mean(values):.{digits}f}"
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {max(deviation, *errors):.{digits}f}"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """FID and bits/dim of each recipe, a point a seed with its interval."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["recipe"] for row in rows))
    canvas = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for axes, label, name in ((left, "fid_eurosat", "fid"), (right, "bits/dim", "bits_per_dim")):
        for row in rows:
            place, found = names.index(row["recipe"]), row["scores"].require(name)
            value = row["bits_per_dim"] if name == "bits_per_dim" else found.value
            axes.errorbar(value, place, xerr=DEVIATIONS * found.error, fmt="o", capsize=3, color=f"C{place}")
        axes.set(xlabel=f"{label} (95 % interval)", yticks=range(len(names)), yticklabels=names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    left.set_xlim(left=0)
    canvas.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
