"""One unit of work: cut the source, score it as it is, finetune it briefly with distillation, report.

It can be killed and started again at any moment: finetuning goes on from its last whole epoch, and a unit that has a
result returns it.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from torch import nn

from models import arch_of, cut, load, save
from models.files import write_text
from pruners import Scores
from training import EVAL_BATCH, Data, Epoch, evaluate, fit, open_data

from .config import SearchConfig, load_config
from .provenance import versions
from .run import Result, Run, Unit
from .space import Space

__all__ = ["run_unit"]


class Workplace:
    """What every unit of a run needs, loaded once per process: configuration, data, source model and space."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config: SearchConfig = load_config(run / "search.toml")
        source = load(run / "source")
        cfg: Any = source.pretrained_cfg
        self.data: Data = open_data(self.config.data.name, cfg, loader_workers=self.config.data.loader_workers)
        self.source = source.to("cuda" if self.config.resources.gpus_per_trial else "cpu")
        self.facts = run.facts()
        names = self.facts["scores"]
        widths, depth = (Scores.load(run / "scores" / names[kind]) for kind in ("width", "depth"))
        self.space = Space(self.config.space, arch_of(source), widths, depth)

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, path: Path) -> Workplace:
        """The workplace of a run's folder; the last one is kept, for the next unit in this process."""
        return cls(Run(path))

    def evaluate(self, model: nn.Module) -> float:
        """Validation top-1 in percent."""
        return evaluate(model, self.data.val_loader(EVAL_BATCH))["top1"]


def run_unit(path: Path, unit: Unit) -> dict[str, Any]:
    """Do a unit of the run at ``path``, or what is left of it.

    Returns what ``result.json`` says, or ``{"state": "stopped"}``. An exception is the unit's failure: its traceback is
    the result.
    """
    run = Run(path)
    found = run.read_result(unit.id)
    if found is not None:
        return found
    try:
        result = _work(Workplace.of(path), unit)
    except Exception:
        return run.write_result(unit.id, error=traceback.format_exc())
    return {"state": "stopped"} if result is None else run.write_result(unit.id, result=result)


def _work(workplace: Workplace, unit: Unit) -> Result | None:
    run, start = workplace.run, time.monotonic()
    folder = run.trial(unit.id)
    candidate = workplace.space.decode(unit.point)
    if candidate.arch.hash != unit.arch_hash:
        raise RuntimeError(f"the point decodes to {candidate.arch.hash}, the driver decoded {unit.arch_hash}")
    write_text(folder / "arch.json", candidate.arch.to_json())
    model = cut(workplace.source, candidate.decision)
    zero_shot = workplace.evaluate(model)
    state = folder / "state.safetensors"
    with _log(run, unit) as log:
        log("start", resumed=state.exists(), zero_shot=zero_shot)
        top1 = _finetune(workplace, model, unit, state, log)
        if top1 is None:
            log("stopped")
            return None
        save(model.cpu(), folder / "model", _provenance(workplace, unit, top1))
        log("end", top1=top1)
    state.unlink(missing_ok=True)
    return Result(
        trial=unit.number,
        top1=top1,
        zero_shot=zero_shot,
        macs=candidate.cost.macs,
        params=candidate.cost.params,
        arch_hash=candidate.arch.hash,
        point=unit.point,
        seconds=time.monotonic() - start,
    )


def _finetune(
    workplace: Workplace, model: nn.Module, unit: Unit, state: Path, log: Callable[..., None]
) -> float | None:
    """Train ``model`` in place; its top-1, or None where it was asked to stop before the last epoch."""
    last: list[float] = []

    def on_epoch(epoch: Epoch) -> None:
        last[:] = [epoch.top1]
        log("epoch", **asdict(epoch))

    finished = fit(
        model,
        workplace.data,
        workplace.config.finetune.model_copy(update={"lr": unit.point["lr"]}),
        teacher=workplace.source,
        seed=unit.seed,
        state=state,
        on_epoch=on_epoch,
        should_stop=workplace.run.stop_file.exists,
    )
    if not finished:
        return None
    return last[0] if last else workplace.evaluate(model)  # no epoch was left to do


def _provenance(workplace: Workplace, unit: Unit, top1: float) -> dict[str, Any]:
    """Where the weights come from, for ``config.json``."""
    return {
        "method": workplace.config.scores.method,
        "source": workplace.facts["source"],
        "scores": workplace.facts["scores"],
        "data": workplace.data.info.fingerprint,
        "point": unit.point,
        "seed": unit.seed,
        "top1": top1,
        "versions": versions(),
    }


@contextlib.contextmanager
def _log(run: Run, unit: Unit) -> Iterator[Callable[..., None]]:
    """``log(event, **values)``: a line of ``metrics.jsonl``, and TensorBoard scalars for epochs."""
    board = SummaryWriter(str(run / "tb" / unit.id))
    path = run.trial(unit.id) / "metrics.jsonl"

    def log(event: str, **values: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **values}) + "\n")
        if event == "epoch":
            for name in ("loss", "top1", "lr", "images_per_s"):
                board.add_scalar(name, values[name], values["epoch"])

    try:
        yield log
    finally:
        board.close()
