"""What ``verify`` sees of a run besides files that are damaged one by one, for which see ``test_damage.py``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from prunesweep.models import load, save
from prunesweep.models.io.store import saved_digest
from prunesweep.search.execution.promote import Promoted
from prunesweep.search.report.page import write_report
from prunesweep.search.store.records import sealed
from prunesweep.search.store.run import Run
from prunesweep.search.verify import verify
from tests.search.execution import test_promote

searched = test_promote.run  # the fixture
PROMOTED = Path("promoted") / "r0-0000"


def member(run: Run) -> Path:
    return run / run.front()[0]["model"]


def replace(folder: Path, value: float) -> None:
    """Save the model with another bias in the place of its own, as a whole and sound folder."""
    model = load(folder)
    with torch.no_grad():
        model.head.bias[0] = value
    save(model, folder)


def forget(run: Run, pattern: str) -> None:
    (found,) = run.path.glob(pattern)
    found.unlink()


CASES: dict[str, tuple[Callable[[Run], object], str]] = {
    "journal empty": (lambda run: (run / "study.journal").write_bytes(b""), "study.journal is empty"),
    "report lost": (lambda run: forget(run, "report.html"), "report.html is lost"),
    "advice lost": (lambda run: forget(run, "advice.json"), "advice.json is damaged or lost"),
    "advice damaged": (lambda run: (run / "advice.json").write_bytes(bytes(9)), "advice.json is damaged or lost"),
    "statistics lost": (lambda run: forget(run, "scores/subspaces-*"), ".safetensors is lost"),
    "another model": (lambda run: replace(member(run), 3.0), "holds another model: its weights are not those"),
    "no numbers": (lambda run: replace(member(run), torch.nan), "head.bias has 1 values that are NaN or infinite"),
    "promotion lost": (lambda run: forget(run, "promoted/*/promoted.json"), "promoted.json is lost"),
    "another promoted model": (lambda run: replace(run / PROMOTED / "model", 3.0), "holds another model"),
}


def test_everything_that_is_lost_or_replaced_is_named(searched: Run) -> None:
    run, model = searched, searched / PROMOTED / "model"
    run.write_front()
    run.write_advice(["a line"])
    write_report(run)
    shutil.copytree(member(run), model)
    facts = Promoted("r0-0000", 1.0, 1.0, None, None, 1, 1, "quick", None, "", weights=saved_digest(model))
    (model.parent / "promoted.json").write_text(sealed(asdict(facts)))
    assert verify(run.path) == []
    for name, (damage, said) in CASES.items():
        copy = Run(run.path.with_name(name))
        shutil.copytree(run.path, copy.path)
        damage(copy)
        problems = [problem.found for problem in verify(copy.path)]
        assert problems, name
        assert all(said in problem and str(copy.path) in problem for problem in problems), (name, problems)


def test_a_search_that_has_not_ended_has_no_report_to_lose(searched: Run) -> None:
    shutil.rmtree(searched.trial("r0-0003"))
    searched.write_front()
    assert not any("report.html" in p.found or "advice.json" in p.found for p in verify(searched.path))
