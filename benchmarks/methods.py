"""The methods beside each other on the glyphs: ``python -m benchmarks.methods [--seed 0] [--train N] [--epochs 1]``.

The source is that of ``examples/glyphs.toml``, or one trained for N epochs. At every budget, what each method makes of
it: as published, which is cut and nothing else; refitted in closed form (``prunesweep prune --recover``); projected to
the widths that the method decides (``--project``). Then what an epoch of training is worth to some, and what methods
make of it that decide while they train (``--deciding`` epochs). Top-1 with its 95 % interval, loss and KL to the
source, in nats, on the 10,000 validation images; seconds are of the processor. ``--part trained`` measures the methods
that decide while they train alone, and leaves all other rows of the result as they are.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.record import begun, write_result
from benchmarks.subspaces import source_of
from prunesweep.models import UserError, arch_of, cost, cut, load
from prunesweep.pruners import Scores, TokenMethod, WidthMethod, get_method
from prunesweep.pruners.subspaces import instant
from prunesweep.training import EVAL_BATCH, Compared, EvalMetrics, evaluate_all, fit, load_recipe, open_data
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.prune_training import TrainedPruning
from prunesweep.training.jobs.recovery import Recovery
from prunesweep.training.jobs.scoring import Calibration, cached_scores

RESULT = Path(__file__).parent / "results" / "methods.json"
CONFIG = Path(__file__).parents[1] / "examples" / "glyphs.toml"
BUDGETS = (0.5, 0.25, 0.1)
INSTANT = (0.5, 0.26, 0.25, 0.1, 0.05, 0.03)
METHODS = ("nvit", "taylor", "isomorphic", "upvit", "magnitude", "random", "subspaces", "pmvit")
TRAINED = ("uvc", "spvit", "nvit-iterative")
DECIDING = "deciding"  # how a model of these came about
FINETUNED = {"as published": "quick", "projected": "gentle"}  # the recipe that fits a model's way
FINETUNED_METHODS = ("nvit", "taylor", "random")
SCORED = Calibration(images=256)
RECOVERY, PROJECTION = Recovery(), Recovery(project=True)

Model = tuple[dict[str, Any], nn.Module]  # what a row is about, and its model


def untrained(source: nn.Module, data: Any, cache: Path) -> Iterator[Model]:
    """Models of every method at every budget that it reaches."""
    arch, batches = arch_of(source), list(RECOVERY.calibration(data))
    known = PROJECTION.known(source, data, batches, cache / "scores")
    for name in METHODS:
        entry: Any = get_method(name, TokenMethod if name == "pmvit" else WidthMethod)
        began = time.process_time()
        scores = Scores.load(cached_scores(source, name, data, SCORED, cache / "scores", lambda *_: None))
        seconds = time.process_time() - began
        for budget in BUDGETS:
            decide = entry.plan_for_budget if isinstance(entry, TokenMethod) else entry.decide
            try:
                decision = decide(arch, scores, budget * cost(arch).macs).cut
            except UserError as error:
                print(f"{name} at {budget}: {error}")
                continue
            row = {"method": name, "budget": budget, "scoring_s": seconds}
            if not getattr(entry, "projected", False):
                yield {**row, "how": "as published"}, cut(source, decision)
                yield {**row, "how": "refitted"}, RECOVERY.model(source, decision, batches)
            if isinstance(entry, WidthMethod):
                yield {**row, "how": "projected"}, PROJECTION.model(source, decision, batches, known=known)
    for point in instant(source, batches, INSTANT):
        yield {"method": "instant", "budget": point.budget, "how": "projected"}, point.model


def deciding(source: nn.Module, epochs: int) -> Iterator[Model]:
    """Models of the methods that decide while they train, in so many epochs."""
    for name in TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe("quick", {"epochs": epochs})
            for budget in BUDGETS[:1]:
                began = time.process_time()
                run = TrainedPruning(source, "glyphs", name, (budget,), recipe, Path(folder) / "out")
                for one in run.run(Placement(1)):
                    seconds = time.process_time() - began
                    yield {"method": name, "budget": budget, "how": DECIDING, "seconds": seconds}, load(one.folder)


def finetuned(models: Sequence[Model], source: nn.Module, data: Any, epochs: int) -> Iterator[Model]:
    """Some of the untrained models, trained for so many epochs with the source as teacher."""
    for row, small in models:
        recipe = FINETUNED.get(row["how"])
        if recipe is None or row["budget"] != BUDGETS[1] or row["method"] not in (*FINETUNED_METHODS, "instant"):
            continue
        model, began = copy.deepcopy(small), time.process_time()
        fit(model, data, load_recipe(recipe, {"epochs": epochs}), teacher=source)
        yield {**row, "how": f"{row['how']}, {recipe}", "seconds": time.process_time() - began}, model


def measured(models: Sequence[Model], answers: Compared) -> list[dict[str, Any]]:
    """Rows with figures on the images whose answers by the source are known, and shares of the source's cost."""
    own, whole = [model for _, model in models], cost(arch_of(answers.source))
    found = evaluate_all(own, answers)
    return [
        {
            **row,
            "macs": cost(arch_of(model)).macs / whole.macs,
            "params": cost(arch_of(model)).params / whole.params,
            **EvalMetrics.of(figures).with_interval(),
        }
        for (row, model), figures in zip(models, found, strict=True)
    ]


def shown(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    name = f"{row['method']:14} {row.get('budget', 1):5} {row['how']:24} {row['macs']:.3f}"
    between = f"({row['top1_low']:.1f} to {row['top1_high']:.1f})"
    return f"{name}  top-1 {row['top1']:6.2f} {between}  loss {row['loss']:7.4f}  KL {row['kl']:7.4f}"


def main() -> None:
    given = begun(__doc__, seed=0, train=0, epochs=1, deciding=8, cache=Path("runs/cache"), part="all")
    training = [f"source.train.epochs={given.train}"] if given.train else []
    source: Any = source_of(given.seed, given.cache, CONFIG, *training)
    data = open_data("glyphs", source.pretrained_cfg)
    answers, rows = Compared(data.val_loader(EVAL_BATCH), source), list[dict[str, Any]]()
    alone = given.part == "trained"
    if alone:
        rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["how"] != DECIDING]

    def keep(models: Sequence[Model]) -> None:
        for row in measured(models, answers):
            print(shown(row), flush=True)
            rows.append(row)
        facts = {name: getattr(given, name) for name in ("seed", "train", "epochs", "deciding")}
        write_result(RESULT, data=data.info.fingerprint, **facts, rows=rows)

    if not alone:
        keep([({"method": "source", "how": "as trained"}, source)])
        models = list[Model]()
        for _, own in groupby(untrained(source, data, given.cache), key=lambda one: one[0]["method"]):
            models += (few := list(own))
            keep(few)
        for one in finetuned(models, source, data, given.epochs) if given.epochs else ():
            keep([one])
    for one in deciding(source, given.deciding) if given.deciding else ():
        keep([one])


if __name__ == "__main__":
    main()
