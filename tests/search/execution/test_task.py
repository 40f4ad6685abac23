"""Units of work, and the sources that they start from, without Ray."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from prunesweep.models import Cut, UserError, arch_of, cost, load, load_provenance, save
from prunesweep.models.io.objects import StoreFails
from prunesweep.pruners import Scores
from prunesweep.search.config import SearchConfig, parse_config
from prunesweep.search.execution import task
from prunesweep.search.execution.coordinator import Coordinator
from prunesweep.search.execution.driver import create_run
from prunesweep.search.execution.source import prepare
from prunesweep.search.execution.task import run_task
from prunesweep.search.space.space import Space
from prunesweep.search.store.run import Run
from prunesweep.search.store.study import Study
from prunesweep.training import EVAL_BATCH, evaluate, open_data
from prunesweep.training.jobs.training_job import TrainingJob
from prunesweep.training.settling import rate_at
from tests.board import scalars


def nothing(what: str, share: float, note: str) -> None:
    """A progress that is not shown."""


def begin(config: SearchConfig, cache: Path, path: Path) -> tuple[Run, Coordinator]:
    prepared = prepare(config, cache, nothing)
    run = Run(path)
    create_run(run, config, prepared)
    study = Study(run / "study.journal", prepared.space.distributions, 0, rank_by=config.search.rank_by)
    return run, Coordinator(run, study, prepared.space, config.search, max_concurrent=3, seed=0)


@pytest.fixture
def started(tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path) -> tuple[Run, Coordinator]:
    return begin(tiny(finetune={"epochs": 3}), runs / "cache", tmp_path / "run")


def events(run: Run, task_id: str) -> list[str]:
    return [json.loads(line)["event"] for line in (run.trial(task_id) / "metrics.jsonl").open()]


def test_a_unit_gives_a_model_and_its_measurements(started: tuple[Run, Coordinator]) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    found = run_task(run.path, unit)
    assert found["state"] == "finished"
    result = found["result"]
    model = load(run.trial(unit.id) / "model")
    source, held_out = load(run / "source"), open_data("digits", search_split=0.2).val_loader(EVAL_BATCH)
    measured = evaluate(model, held_out, source=source)
    assert measured.items() >= {n: result[n] for n in ("top1", "loss", "images")}.items()
    assert [measured[name] for name in ("kl", "agreement")] == pytest.approx([result["kl"], result["agreement"]])
    assert result["images"] == 269  # of 1,347 for training
    assert arch_of(model).hash == unit.arch_hash == result["arch_hash"]
    provenance = load_provenance(run.trial(unit.id) / "model")
    assert provenance["point"] == unit.point
    assert provenance["source"]["weights"] == run.metadata()["source"]["weights"]
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert events(run, unit.id) == ["start", "epoch", "epoch", "epoch", "end"]
    coordinator.complete(unit.id)
    assert coordinator.results[0].top1 == result["top1"]


def test_a_unit_trained_gently_says_what_was_kept(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    config = tiny(finetune={"recipe": "gentle", "epochs": 1}, space={"lr": [5e-4, 5e-4]})
    run, coordinator = begin(config, runs / "cache", tmp_path / "run")
    unit = coordinator.next()
    assert unit is not None
    assert run_task(run.path, unit)["state"] == "finished"
    facts = load_provenance(run.trial(unit.id) / "model")
    share = cost(arch_of(load(run.trial(unit.id) / "model"))).macs / run.metadata()["source"]["macs"]
    assert facts["lr"] == pytest.approx(rate_at(config.finetune.lr_by_share, share))
    assert len(facts["kept"]["held_out_kl"]) == 2


def test_workers_of_a_unit_open_the_data_that_the_run_has(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"name": "digits", "loader_workers": 1, "unreadable": 0.25}
    run, coordinator = begin(tiny(data=options), runs / "cache", tmp_path / "run")
    unit, sent = coordinator.next(), list[TrainingJob]()
    assert unit is not None

    def stopped(job: TrainingJob, *_: Any, **__: Any) -> bool:
        sent.append(job)
        return False

    monkeypatch.setattr(task, "run_job", stopped)
    assert run_task(run.path, unit) == {"state": "stopped"}
    unset = {"class_order": None, "classes": None}
    assert sent[0].data_options == {**unset, "loader_workers": 1, "unreadable": 0.25, "search_split": 0.2}


def test_a_finished_unit_is_not_done_again(started: tuple[Run, Coordinator]) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    assert run_task(run.path, unit) == run_task(run.path, unit)
    assert events(run, unit.id).count("start") == 1


def test_a_stopped_unit_goes_on_to_the_same_result(started: tuple[Run, Coordinator], tmp_path: Path) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    run.stop_file.touch()
    assert run_task(run.path, unit) == {"state": "stopped"}
    assert (run.trial(unit.id) / "state.safetensors").exists()
    assert run.read_result(unit.id) is None
    run.stop_file.unlink()
    found = run_task(run.path, unit)["result"]
    assert events(run, unit.id) == ["start", "epoch", "stopped", "start", "epoch", "epoch", "end"]
    weights = load(run.trial(unit.id) / "model").state_dict()

    for file in ("result.json", "metrics.jsonl"):
        (run.trial(unit.id) / file).unlink()
    again = run_task(run.path, unit)["result"]
    clocks = {"seconds": 0, "training_seconds": 0, "computing_seconds": 0}
    assert again["computing_seconds"] > 0
    assert again["computing_seconds"] + again["training_seconds"] < again["seconds"]
    assert {**again, **clocks} == {**found, **clocks}
    uninterrupted = load(run.trial(unit.id) / "model").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in uninterrupted.items())


def test_a_state_that_is_damaged_is_said_and_training_begins_anew(started: tuple[Run, Coordinator]) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    whole = run_task(run.path, unit)["result"]
    (run.trial(unit.id) / "result.json").unlink()
    run.stop_file.touch()
    assert run_task(run.path, unit) == {"state": "stopped"}
    run.stop_file.unlink()
    half_zero(run.trial(unit.id) / "state.safetensors")
    again = run_task(run.path, unit)["result"]
    clocks = {"seconds": 0, "training_seconds": 0, "computing_seconds": 0}
    assert {**again, **clocks} == {**whole, **clocks}
    said = [json.loads(line) for line in (run.trial(unit.id) / "metrics.jsonl").open()]
    (note,) = (line["text"] for line in said if line["event"] == "note")
    assert "state.safetensors is damaged, or of another version: training begins anew" in note


def test_before_finetuning_is_as_cut_on_every_rung(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    tables = {
        "search": {"trials": 2, "rungs": [4, 4], "reduction_factor": 2},
        "space": {"budget": [0.85, 0.9], "skip": [0, 0], "lr": [3e-3, 3e-3]},
        "finetune": {"batch_size": 32, "distill": []},  # the source, at chance, would hold them there
    }
    run, coordinator = begin(tiny(**tables), runs / "cache", tmp_path / "r")
    while (unit := coordinator.next()) is not None:
        assert run_task(run.path, unit)["state"] == "finished"
        coordinator.complete(unit.id)
    above = next(r for r in coordinator.results if r.rung == 1)
    below = next(r for r in coordinator.results if (r.trial, r.rung) == (above.trial, 0))
    assert above.zero_shot == below.zero_shot != below.top1
    assert {p["epochs"] for p in run.front() if p["trial"] == above.trial} <= {8}
    logged = scalars(run / "tb" / f"trial-{above.trial:04d}", "top1")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6, 7, 8]  # one run for both rungs, in order
    assert [logged[3][1], logged[7][1]] == pytest.approx([below.top1, above.top1])
    assert {path.name for path in (run / "tb").iterdir()} == {"trial-0000", "trial-0001"}


def test_a_decision_is_made_once_and_checked(started: tuple[Run, Coordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's cut travels with the unit; no worker decodes the point again, but in runs that have no cut."""
    run, coordinator = started
    unit, other, third = (coordinator.next() for _ in range(3))
    assert unit is not None
    assert other is not None
    assert third is not None
    decode = Space.decode
    decoded: list[Any] = []
    monkeypatch.setattr(Space, "decode", lambda space, point: decoded.append(point) or decode(space, point))
    found = run_task(run.path, unit)["result"]
    assert decoded == []
    assert found["arch_hash"] == unit.arch_hash
    kept = run.trial(third.id) / "cut.json"
    assert (
        Cut.from_dict(json.loads(kept.read_text())).to_dict()
        == coordinator.space.decode(third.point).decision.to_dict()
    )
    decoded.clear()

    kept.write_text((run.trial(unit.id) / "cut.json").read_text())  # another candidate's
    assert third.key != unit.key
    assert "the driver decoded" in run_task(run.path, third)["reason"]
    assert decoded == []
    (run.trial(other.id) / "cut.json").unlink()  # as in a run of an earlier version
    assert run_task(run.path, other)["result"]["arch_hash"] == other.arch_hash
    assert decoded == [other.point]


def test_the_source_is_trained_once_and_scores_are_kept(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(what: str, share: float, note: str) -> None:
        if what not in seen:
            seen.append(what)

    first = prepare(tiny(), tmp_path, watch)
    assert seen == ["training the source", "evaluating the source", "scoring widths", "measuring blocks"]
    seen.clear()
    second = prepare(tiny(), tmp_path, watch)
    assert seen == ["scores from the cache"]
    assert first.score_files == second.score_files
    assert len(set(first.score_files.values())) == 2
    seen.clear()
    prepare(tiny(scores={"images": 32}), tmp_path, watch)
    assert seen == ["scoring widths", "measuring blocks"]
    seen.clear()
    prepare(tiny(seed=1), tmp_path, watch)
    assert "training the source" in seen
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("*.state.safetensors"))


def test_the_order_of_blocks_can_be_learned(tiny: Callable[..., SearchConfig], tmp_path: Path) -> None:
    """One UVC run before the search; its gates are kept, and any later search on them costs nothing."""
    gates = {"recipe": {"epochs": 2, "batch_size": 128}, "settings": {"warmup_epochs": 0, "ramp_steps": 10}}
    config = tiny(space={"skip_order": "learned"}, gates=gates)
    seen: list[str] = []
    prepared = prepare(config, tmp_path, lambda what, *_: seen.append(what))
    assert "learning gates" in seen
    assert "measuring blocks" not in seen
    scores = Scores.load(prepared.score_files["uvc_gates"]).vectors["depth"]
    worst = int(scores.argmin())
    kept = [b.src for b in prepared.space.decode({"budget": 0.9, "skip": 1, "lr": 1e-3}).arch.blocks]
    assert kept == [i for i in range(3) if i != worst]
    seen.clear()
    prepare(config, tmp_path, lambda what, *_: seen.append(what))
    assert set(seen) == {"scores from the cache"}


def small_timm() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2}
    return timm.create_model("deit_tiny_patch16_224", **shape)


def folder_config(image_folder: Path, source: dict[str, Any], **tables: Any) -> SearchConfig:
    small = {"embed": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 8}
    data = {
        "name": "folder",
        "data": {"name": f"imagefolder:{image_folder}"},
        "source": source,
        "scores": {"images": 8, "batch_size": 4},
        "space": {"budget": [0.4, 0.8], "skip": [0, 1], "groups": small},
        "finetune": {"epochs": 1, "batch_size": 4, "distill": [{}]},
        **tables,
    }
    return parse_config(data, "folder")


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    """The same network in every form that a trained source can come in."""
    model = small_timm()
    save(model, folder / "ours")
    timm.models.save_for_hf(model, str(folder / "timms"), safe_serialization=True)
    torch.save(model.state_dict(), folder / "weights.pth")
    save_file(model.state_dict(), folder / "weights.safetensors")
    plain = {"model": "deit_tiny_patch16_224", "args": {**SHAPE, "num_classes": 2}}
    return {
        "a folder of ours": {"model": f"local-dir:{folder / 'ours'}"},
        "a folder of timm's": {"model": f"local-dir:{folder / 'timms'}"},
        "a .pth file": {**plain, "args": {**plain["args"], "checkpoint_path": str(folder / "weights.pth")}},
        "a .safetensors file": {
            **plain,
            "args": {**plain["args"], "checkpoint_path": str(folder / "weights.safetensors")},
        },
    }


def test_trained_sources_in_every_form_are_the_same_source(image_folder: Path, tmp_path: Path) -> None:
    found = {
        name: prepare(folder_config(image_folder, source), tmp_path / "cache", nothing)
        for name, source in sources(tmp_path).items()
    }
    assert len({p.weights for p in found.values()}) == 1
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = small_timm().eval()(x)
        assert all(torch.equal(p.model(x), want) for p in found.values())


def test_images_from_a_folder_go_all_the_way(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_timm(), tmp_path / "source")
    monkeypatch.chdir(tmp_path)  # relative paths mean the user's folder, whatever a worker's is
    config = folder_config(Path("images"), {"model": "local-dir:source"})
    run, coordinator = begin(config, tmp_path / "cache", tmp_path / "run")
    unit = coordinator.next()
    assert unit is not None
    monkeypatch.chdir("/")
    found = run_task(run.path, unit)
    assert found["state"] == "finished", found
    assert found["result"]["macs"] <= unit.point["budget"] * run.metadata()["source"]["macs"]


def test_a_pretrained_source_can_be_trained_on_the_users_classes(image_folder: Path, tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 4}
    scratch = {"model": "deit_tiny_patch16_224", "args": SHAPE, "train": train}
    prepared = prepare(folder_config(image_folder, scratch), tmp_path / "cache", nothing)
    assert prepared.arch.num_classes == 2
    saved = {"model": f"local-dir:{prepared.folder}", "train": train}
    again = prepare(folder_config(image_folder, saved), tmp_path / "cache", nothing)
    assert again.weights != prepared.weights


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model": "local-dir:/nowhere"}, "no folder of a saved model"),
        ({"model": "resnet18", "train": {"epochs": 1}, "args": {}}, "is a ResNet"),
        ({"model": "deit_tiny_patch16_224", "args": {"checkpoint_path": "/no.pth"}}, "cannot be made"),
        (
            {"model": "deit_tiny_patch16_224", "args": {**SHAPE, "num_classes": 5}, "train": {"epochs": 1}},
            "has 5 classes",
        ),
    ],
)
def test_sources_that_cannot_be_used_say_why(
    source: dict[str, Any], message: str, image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        prepare(folder_config(image_folder, source), tmp_path / "cache", nothing)
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_position_scale_would_spoil_trained_weights(image_folder: Path, tmp_path: Path) -> None:
    save(small_timm(), tmp_path / "ours")
    source = {"model": f"local-dir:{tmp_path / 'ours'}", "pos_embed_std": 0.5}
    with pytest.raises(UserError, match="would overwrite trained weights"):
        prepare(folder_config(image_folder, source), tmp_path / "cache", nothing)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: half_zero(run / "source" / "model.safetensors"), "source"),
        (lambda run: (run / "source" / "config.json").write_text(""), "source"),
        (lambda run: (run / "run.json").unlink(), "run.json is damaged or missing"),
        (lambda run: move_data(run), "no folder /gone/train"),
    ],
    ids=["zeros in the source", "no record", "no facts", "no data"],
)
@pytest.mark.parametrize("late", [False, True], ids=["first", "later"])
def test_what_every_unit_needs_is_missed_by_the_run_and_not_by_a_candidate(
    damage: Callable[[Run], object],
    reason: str,
    late: bool,
    started: tuple[Run, Coordinator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is booked, whether a process finds out when it begins or when a unit trips over what has gone."""
    run, coordinator = started
    unit, other = coordinator.next(), coordinator.next()
    assert unit is not None
    assert other is not None
    if late:
        assert run_task(run.path, other)["state"] == "finished"
        monkeypatch.setattr(task, "_finetune", fail)
    damage(run)
    found = run_task(run.path, unit)
    assert found["state"] == "broken"
    assert reason in found["reason"]
    assert run.read_result(unit.id) is None
    coordinator.complete(unit.id)
    assert coordinator.failures == {}
    assert coordinator.next() is not None


def half_zero(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def move_data(run: Run) -> None:
    settings = (run / "search.toml").read_text()
    (run / "search.toml").write_text(settings.replace('name = "digits"', 'name = "imagefolder:/gone"'))


def fail(*_: Any) -> bool:
    raise RuntimeError("this candidate cannot be trained")


def test_a_candidate_that_cannot_be_trained_has_failed_and_the_run_goes_on(
    started: tuple[Run, Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, coordinator = started
    unit, other = coordinator.next(), coordinator.next()
    assert unit is not None
    assert other is not None
    with monkeypatch.context() as patch:
        patch.setattr(task, "_finetune", fail)
        assert "this candidate cannot be trained" in run_task(run.path, unit)["error"]
    coordinator.complete(unit.id)
    assert list(coordinator.failures) == [unit.id]
    assert run_task(run.path, other)["state"] == "finished"


def test_scores_are_needed_by_all_where_decisions_are_not_kept(started: tuple[Run, Coordinator]) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    (run.trial(unit.id) / "cut.json").unlink()
    for path in (run / "scores").iterdir():
        half_zero(path)
    found = run_task(run.path, unit)
    assert found["state"] == "broken"
    assert "scores" in found["reason"]
    assert "is damaged" in found["reason"]


def test_training_that_diverges_is_a_result_without_a_number(
    tiny: Callable[..., SearchConfig], runs: Path, tmp_path: Path
) -> None:
    run, coordinator = begin(
        tiny(finetune={"epochs": 3, "lr": 100, "optimizer": "sgd", "clip_grad": 0}, space={"lr": [99, 100]}),
        runs / "cache",
        tmp_path / "run",
    )
    unit = coordinator.next()
    assert unit is not None
    found = run_task(run.path, unit)
    assert found["state"] == "finished", found
    assert math.isnan(found["result"]["top1"])
    assert not found["result"]["has_model"]
    assert events(run, unit.id)[-1] == "diverged"
    assert {path.name for path in run.trial(unit.id).iterdir()} == {
        "arch.json",
        "cut.json",
        "metrics.jsonl",
        "result.json",
        "spec.json",
    }
    coordinator.complete(unit.id)
    assert coordinator.failures == {}
    assert coordinator.front == []


def test_a_training_that_was_killed_for_memory_goes_on_with_smaller_parts(
    started: tuple[Run, Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the kernel has killed something since it began, and not where its process was lost otherwise."""
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None
    given, train = list[int](), task.run_job

    def lost(job: TrainingJob, *arguments: Any, **options: Any) -> bool:
        given.append(job.halvings)
        if len(given) < 4:
            raise SystemExit
        return train(job, *arguments, **options)

    monkeypatch.setattr(task, "run_job", lost)
    for kills in (3, 3, 4):
        monkeypatch.setattr(task, "memory_kills", lambda kills=kills: kills)
        with pytest.raises(SystemExit):
            run_task(run.path, unit)
    monkeypatch.setattr(task, "memory_kills", lambda: 9)
    assert run_task(run.path, unit)["state"] == "finished"
    assert given == [0, 0, 1, 2]
    assert "note" in events(run, unit.id)
    assert not (run.trial(unit.id) / task.ATTEMPT).exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "broken"),
        (OSError(errno.EIO, "Input/output error"), "broken"),
        (RuntimeError("unable to open file: Too many open files"), "broken"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (StoreFails("s3://bucket/run: the store has not answered for 600 s"), "broken"),
        (RuntimeError("shapes do not match"), "failed"),
    ],
)
def test_what_the_machine_refuses_is_not_the_candidate_s_failure(
    started: tuple[Run, Coordinator], monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    run, coordinator = started
    unit = coordinator.next()
    assert unit is not None

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(task, "_work", fail)
    found = run_task(run.path, unit)
    assert found["state"] == state
    assert (run.read_result(unit.id) is None) == (state != "failed")
    if state == "broken":
        assert found["reason"].endswith(str(error))
