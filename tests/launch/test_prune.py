from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from prunesweep.launch import prune_runners
from prunesweep.launch.cli import app
from prunesweep.models import BlockCut, Cut, UserError, arch_of, cost, cut, load, load_provenance, save
from prunesweep.models.latency.building import macs_table
from prunesweep.training import Recipe, fit, open_data, seeded
from prunesweep.training.jobs.finetune import Finetuning
from prunesweep.training.jobs.prune_training import TrainedPruning

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 3, "num_heads": 4}
runner = CliRunner()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model("vit_tiny_patch16_224", **SHAPE), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = load(source)
    with seeded(0):
        fit(model, open_data("digits", model.pretrained_cfg), Recipe(epochs=6, batch_size=64, lr=3e-3))
    return save(model, tmp_path_factory.mktemp("trained") / "model")


def prune(source: Path, out: Path, *options: str, method: str = "nvit", budget: str = "0.6"):
    return runner.invoke(
        app,
        [
            *("prune", str(source), "--method", method, "--budget", budget, "--data", "digits"),
            *("--out", str(out / "small"), "--cache", str(out / "scores"), "--images", "64"),
            *("--group", "heads=1", "--group", "mlp=8", "--group", "embed=8", "--group", "dim=4"),
            *options,
        ],
    )


def test_one_method_once(source: Path, tmp_path: Path) -> None:
    result = prune(source, tmp_path, "--json", "--drop", "1", "--floor", "mlp=0.25")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    small = load(tmp_path / "small")
    assert facts["macs"] == cost(arch_of(small)).macs <= 0.6 * cost(arch_of(load(source))).macs
    assert arch_of(small).depth == 2
    assert min(block.mlp for block in arch_of(small).blocks) >= 32
    provenance = load_provenance(tmp_path / "small")
    assert provenance["method"] == "nvit"
    assert (tmp_path / "scores" / provenance["scores"]).exists()
    assert len(list((tmp_path / "scores").iterdir())) == 2  # of widths and of blocks


@pytest.mark.parametrize("method", ["nvit", "upvit", "isomorphic", "taylor", "magnitude", "random"])
def test_what_was_asked_and_what_is_spent(trained: Path, tmp_path: Path, method: str) -> None:
    """With the usual groups, two of which are the residual stream: the budget is met, or it is said by how much not."""
    out, whole = tmp_path / "small", cost(arch_of(load(trained))).macs
    result = by_method(trained, method, "--budget", "0.5", "--out", str(out), "--cache", str(tmp_path / "scores"))
    assert result.exit_code == 0, (result.output, result.exception)
    spent = load_provenance(out)["budget"]
    assert spent["cost"] == cost(arch_of(load(out))).macs <= spent["limit"] == 0.5 * whole
    assert (spent["measure"], spent["limit_share"]) == ("macs", 0.5)
    assert spent["cost_share"] == spent["cost"] / whole
    if method == "isomorphic":  # widths are even, a step of which is a per cent of this model
        missed = f"the budget, 0.5 of the source's MACs, is not met, {spent['cost_share']:.3f} are spent: the smallest"
        assert (missed in result.output) == ("hindrance" in spent) == (spent["cost_share"] < 0.995 * 0.5)
    else:
        assert spent["cost_share"] >= 0.995 * 0.5
        assert "not met" not in result.output


def test_predicted_latency_is_told(trained: Path, tmp_path: Path) -> None:
    model = load(trained)
    table = macs_table(arch_of(model), ms_per_gmac=500.0)
    table.save(tmp_path / "table.json")
    options = ("--measure", "latency_ms", "--table", str(tmp_path / "table.json"), "--no-recover")
    result = prune(trained, tmp_path, *options, method="magnitude", budget="0.5")
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = table.predict(arch_of(model)), table.predict(arch_of(load(tmp_path / "small")))
    assert 0.4975 * before <= after <= 0.5 * before
    share = f"({after / before:.3f} of the source's {before:.4g} ms)"
    assert f"predicted {after:.4g} ms per batch {share}" in result.output


def test_a_source_with_weights_that_are_no_numbers_is_refused(source: Path, tmp_path: Path) -> None:
    model: Any = load(source)
    model.blocks[0].attn.proj.weight.data[0, 0] = torch.nan
    broken = save(model, tmp_path / "broken")
    data, cache = ("--data", "digits"), ("--cache", str(tmp_path / "scores"))
    for command in (
        ("prune", str(broken), "--method", "magnitude", "--budget", "0.5", "--out", str(tmp_path / "small"), *cache),
        ("prune", str(broken), "--method", "uvc", "--budget", "0.5", "--out", str(tmp_path / "small")),
        ("score", str(broken), "--method", "nvit", *cache),
        ("instant", str(broken), "--out", str(tmp_path / "front")),
    ):
        result = runner.invoke(app, [*command, *data])
        assert isinstance(result.exception, UserError), (result.output, result.exception)
        assert "broken: blocks.0.attn.proj.weight has 1 values that are NaN or infinite" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_scores_that_tell_nothing_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE, init_values=0.1)
    model.blocks[1].ls2.gamma.data.zero_()
    source = save(model, tmp_path / "source")
    with pytest.warns(
        UserWarning, match="taylor: scores of 'mlp' are all 0 in blocks.1: their branch has a LayerScale"
    ):
        result = prune(source, tmp_path, "--no-recover", method="taylor")
    assert result.exit_code == 0, (result.output, result.exception)


def test_another_budget_costs_no_scoring(source: Path, tmp_path: Path) -> None:
    arguments = ["score", str(source), "--method", "taylor", "--data", "digits", "--images", "64"]
    scored = runner.invoke(app, [*arguments, "--cache", str(tmp_path / "scores")])
    assert scored.exit_code == 0, scored.output
    (cached,) = (tmp_path / "scores").iterdir()
    assert cached.name in scored.stdout.replace("\n", "")
    before = cached.stat().st_mtime_ns
    result = prune(source, tmp_path, "--measure", "params", method="taylor", budget="20K")
    assert result.exit_code == 0, result.output
    assert cost(arch_of(load(tmp_path / "small"))).params <= 20_000
    assert [path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()] == [before]


def test_a_cut_is_recovered_unless_it_is_to_stay_as_cut(trained: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in {"as cut": ["--no-recover"], "refits": [], "projection": ["--project"]}.items():
        result = prune(trained, tmp_path / name, "--json", "--recover-images", "400", *options, budget="0.5")
        assert result.exit_code == 0, (result.output, result.exception)
        found[name] = json.loads(result.stdout)
        assert load_provenance(tmp_path / name / "small")["recovery"] == found[name].get("recovery", {})
    assert "recovery" not in found["as cut"]
    for name in ("refits", "projection"):
        own = found[name]["recovery"]
        assert (own["by"], own["images"]) == (name, 400)
        assert own["as_cut"]["top1"] == found["as cut"]["top1"]
        assert own["kl"] < 0.5 * own["as_cut"]["kl"]
        assert found[name]["top1"] > found["as cut"]["top1"]
    assert arch_of(load(tmp_path / "refits" / "small")) == arch_of(load(tmp_path / "as cut" / "small"))
    assert found["refits"]["macs"] == found["as cut"]["macs"]
    assert found["projection"]["recovery"]["kl"] < found["refits"]["recovery"]["kl"]
    for name in found:
        assert load_provenance(tmp_path / name / "small")["budget"]["cost"] == found[name]["macs"]


def test_what_cannot_be_recovered_stays_as_cut_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    planned = Cut(blocks=(BlockCut(mixer="conv3x3"), BlockCut(), BlockCut()))
    source = save(cut(timm.create_model("vit_tiny_patch16_224", **SHAPE), planned), tmp_path / "source")
    result = prune(source, tmp_path, method="magnitude", budget="0.9")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "left as cut, not recovered: " in result.output
    assert "blocks[0] has a convolution" in load_provenance(tmp_path / "small")["recovery"]["not_recovered"]
    for option in ("--recover", "--project"):
        asked = prune(source, tmp_path / option, option, method="magnitude", budget="0.9")
        assert str(asked.exception).startswith(f"{option}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nvti"}, "--method nvti: must be one of nvit, upvit,"),
        ({"budget": "half"}, "--budget half: must be a number such as 0.5, 300M or 1.2G"),
        ({"budget": "-1"}, "budget = -1.0: give a share"),
        ({"budget": "1.5"}, "did you mean 1.5M or 1.5G?"),
        ({"budget": "20G"}, "budget = 2e+10: is above the source, which has"),
        ({"budget": "0.0001"}, "macs cannot be reached"),
        ({"extra": ("--measure", "flops")}, "--measure flops: must be one of macs, params, latency_ms"),
        ({"extra": ("--group", "mpl=3")}, "--group mpl=3: unknown kind 'mpl'; known: embed"),
        ({"extra": ("--group", "mlp")}, "--group mlp: must be KIND=VALUE"),
        ({"extra": ("--drop", "3")}, "drop = 3: the model has 3 blocks"),
        ({"extra": ("--project", "--no-recover")}, "--project: projects, which is a way to recover, so it"),
        ({"method": "isomorphic"}, "means nothing to method 'isomorphic'; it takes --budget, --measure, --project"),
    ],
)
def test_errors_leave_nothing_behind(source: Path, tmp_path: Path, options: dict, message: str) -> None:
    result = prune(source, tmp_path, *options.pop("extra", ()), **options)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not (tmp_path / "small").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    result = prune(Path("deit_tinny_patch16_224"), tmp_path)
    assert "neither the folder of a saved model nor a timm model. did you mean 'deit_tiny_patch16_224'?" in str(
        result.exception
    )
    (tmp_path / "small").mkdir()
    assert "is there already; give a new folder" in str(prune(tmp_path, tmp_path).exception)


def by_method(source: Path, method: str, *options: str):
    arguments = ["prune", str(source), "--method", method, "--data", "digits", "--images", "64", *options]
    return runner.invoke(app, arguments)


QUICK = ("--recipe", "quick", "--set", "recipe.epochs=2", "--set", "recipe.batch_size=128")
AFTER = ("--finetune", "quick", "--set", "finetune.epochs=1", "--set", "finetune.batch_size=128")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("uvc", ("--set", "warmup_epochs=0", "--set", "ramp_steps=8", "--set", "skip=101")),
        ("spvit", ("--set", "theta_lr=0.1", "--set", "weight=8", "--set", "recipe.epochs=3")),
        ("nvit-iterative", ("--set", "interval=1", "--set", "groups_per_step=6")),
    ],
)
def test_methods_that_decide_while_they_train(
    source: Path, tmp_path: Path, method: str, settings: tuple[str, ...]
) -> None:
    out = tmp_path / "small"
    result = by_method(source, method, "--budget", "0.6", *QUICK, *AFTER, *settings, "--out", str(out), "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    epochs = 3 if method == "spvit" else 2
    assert f"{method} decides while it trains: {epochs} epochs of recipe quick, then 1 of quick" in result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    small = load(out)
    whole = cost(arch_of(load(source))).macs
    assert facts["macs"] == cost(arch_of(small)).macs <= 0.6 * whole
    assert facts["budget"] == load_provenance(out)["spent"]
    assert facts["budget"]["cost"] == facts["macs"]
    assert facts["macs"] >= 0.995 * 0.6 * whole or facts["budget"]["hindrance"]
    assert facts["model"] == str(out)
    assert load_provenance(out)["top1"] == facts["top1"]
    assert not list(tmp_path.glob(".*"))
    assert len(list((out / "logs").rglob("metrics.jsonl"))) == 2  # of the method's training and of finetuning
    if method == "uvc":
        assert [block.src for block in arch_of(small).blocks] == [0, 2]
        assert facts["macs"] > 0.57 * whole


def test_nothing_of_another_command_is_used(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    uvc = ("--budget", "0.6", *QUICK, *AFTER, "--set", "warmup_epochs=0", "--set", "ramp_steps=8", "--set", "skip=101")
    first = by_method(source, "uvc", *uvc, "--out", str(out))
    assert first.exit_code == 0, (first.output, first.exception)
    out.rename(tmp_path / "moved")
    spvit = ("--budget", "0.6", *QUICK, *AFTER, "--set", "theta_lr=0.1", "--set", "weight=8")
    second = by_method(source, "spvit", *spvit, "--set", "recipe.epochs=3", "--out", str(out))
    assert second.exit_code == 0, (second.output, second.exception)
    assert (arch_of(load(tmp_path / "moved")).depth, arch_of(load(out)).depth) == (2, 3)


def test_what_a_stopped_command_left_is_used_by_the_very_same_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped when it has decided; other settings decide anew, and so does the same command on changed work."""
    out = tmp_path / "small"
    decided: list[float] = []
    train = TrainedPruning.run

    def run(self: TrainedPruning, *arguments: Any, **options: Any) -> Any:
        decided.extend(self.budgets)
        return train(self, *arguments, **options)

    monkeypatch.setattr(TrainedPruning, "run", run)

    def command(budget: str, *options: str, stop: bool = True) -> None:
        given = ("--budget", budget, *QUICK, *AFTER, "--set", "warmup_epochs=0", "--set", "ramp_steps=8", *options)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(prune_runners, "finetune", Mock(side_effect=KeyboardInterrupt))
            result = by_method(source, "uvc", *given, "--out", str(out))
        assert (result.exit_code == 0) == (not stop), (result.output, result.exception)

    command("0.6")
    assert decided == [0.6]
    command("0.6")
    assert decided == [0.6]
    command("0.7")
    command("0.6", "--images", "32")
    assert decided == [0.6, 0.7, 0.6]
    for file in tmp_path.glob(".small-*/job.json"):
        file.write_text("{}")
    command("0.6")
    assert decided == [0.6, 0.7, 0.6, 0.6]
    command("0.6", stop=False)
    assert decided == [0.6, 0.7, 0.6, 0.6]
    assert cost(arch_of(load(out))).macs <= 0.6 * cost(arch_of(load(source))).macs


def test_several_budgets_out_of_one_run(source: Path, tmp_path: Path) -> None:
    settings = ("--set", "interval=1", "--set", "groups_per_step=6", "--finetune", "none")
    out = tmp_path / "ladder"
    result = by_method(source, "nvit-iterative", "--budget", "0.8,0.6", *QUICK, *settings, "--out", str(out))
    assert result.exit_code == 0, (result.output, result.exception)
    for budget in (0.8, 0.6):
        small, whole = cost(arch_of(load(out / f"{budget}"))).macs, cost(arch_of(load(source))).macs
        assert 0.995 * budget * whole <= small <= budget * whole
        spent = load_provenance(out / f"{budget}")["spent"]
        assert (spent["cost"], spent["limit_share"]) == (small, pytest.approx(budget))


def test_several_budgets_are_there_together_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the command is killed between the two: the same one then finetunes the second, and only that."""
    out, real, begun = tmp_path / "ladder", prune_runners.finetune, list[str]()
    settings = ("--set", "interval=1", "--set", "groups_per_step=6", *AFTER)
    command = ("nvit-iterative", "--budget", "0.8,0.6", *QUICK, *settings, "--out", str(out))

    def finetune(job: Finetuning, *arguments: Any, **options: Any) -> None:
        begun.append(job.out.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        real(job, *arguments, **options)

    monkeypatch.setattr(prune_runners, "finetune", finetune)
    assert by_method(source, *command).exit_code != 0
    assert not out.exists()
    result = by_method(source, *command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert begun == ["0.8", "0.6", "0.6"]
    assert {path.name for path in out.iterdir()} == {"0.8", "0.6", "logs"}
    assert not list(tmp_path.glob(".*"))


def test_tokens_by_keep_rate_and_by_budget(source: Path, tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "scores"))
    kept = by_method(
        source, "pmvit", "--keep-rate", "0.5", *cache, "--out", str(tmp_path / "a"), "--set", "prune_rate=0"
    )
    assert kept.exit_code == 0, (kept.output, kept.exception)
    blocks = arch_of(load(tmp_path / "a")).blocks
    assert sum(block.tokens or 0 for block in blocks) == 3 * (1 + 8)
    met = by_method(source, "pmvit", "--budget", "0.8", *cache, "--out", str(tmp_path / "b"), *AFTER)
    assert met.exit_code == 0, (met.output, met.exception)
    assert cost(arch_of(load(tmp_path / "b"))).macs <= 0.8 * cost(arch_of(load(source))).macs
    assert len(list((tmp_path / "scores").iterdir())) == 1


def test_tome_is_evaluated_only(source: Path) -> None:
    result = by_method(source, "tome", "--r", "2", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    facts = json.loads(result.stdout)
    assert facts["macs"] < cost(arch_of(load(source))).macs


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("uvc", (), "--budget: method 'uvc' needs one"),
        (
            "uvc",
            ("--budget", "0.6", "--drop", "1"),
            "--drop: means nothing to method 'uvc'; it takes --budget, --recipe",
        ),
        ("uvc", ("--budget", "0.6", "--set", "skpi=101"), "unknown setting 'skpi'. did you mean 'skip'?"),
        ("uvc", ("--budget", "0.6", "--set", "skip=1111"), "has 4 digits for 3 blocks"),
        ("uvc", ("--budget", "0.6", "--set", "recipe=quick"), "give --recipe quick, or fields"),
        ("uvc", ("--budget", "1.5"), "did you mean 1.5M or 1.5G?"),
        ("uvc", ("--budget", "20G"), "is above the source, which has"),
        ("pmvit", ("--budget", "20G"), "is above the source, which has"),
        ("nvit-iterative", ("--budget", "0.5", *QUICK), "takes at least"),
        ("pmvit", ("--budget", "2"), "did you mean 2M or 2G?"),
        ("uvc", ("--budget", "0.01"), "blocks at their narrowest have"),
        ("spvit", ("--budget", "0.6,0.5"), "serves one budget in a run"),
        ("spvit", ("--budget", "0.6", "--set", "alpha=-1"), "method 'spvit': alpha = -1"),
        ("pmvit", (), "give either a keep rate or a budget"),
        ("pmvit", ("--keep-rate", "1.5"), "keep_rate = 1.5"),
        ("tome", (), "--r: method 'tome' needs the number of tokens"),
        ("nvit", ("--budget", "0.6", "--set", "a=1"), "--set: means nothing to method 'nvit'"),
    ],
)
def test_options_that_do_not_fit_the_method(
    source: Path, tmp_path: Path, method: str, options: tuple[str, ...], message: str
) -> None:
    out = () if method == "tome" else ("--out", str(tmp_path / "small"))
    result = by_method(source, method, *options, *out, "--cache", str(tmp_path / "scores"))
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert message in str(result.exception)
    assert not list(tmp_path.glob("small*"))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nvit", ("--finetune", "qick"), "unknown recipe 'qick'"),
        ("nvit", (*AFTER, "--set", "finetune.epochz=1"), "recipe quick: epochz: unknown field"),
        ("nvit", ("--set", "finetune.epochs=1"), "finetune.epochs: nothing is finetuned; give a recipe"),
        ("uvc", ("--recipe", "qick"), "unknown recipe 'qick'"),
        ("uvc", ("--set", "recipe.optimizer=adamx"), "optimizer = 'adamx': timm has none of that name"),
        ("uvc", ("--set", "recipe.epochs=1e0"), "epochs = 1.0: Input should be a valid integer"),
        ("spvit", ("--set", "thta=1"), "method 'spvit': unknown setting 'thta'. did you mean 'theta'?"),
    ],
)
def test_names_are_checked_before_anything_is_opened(
    tmp_path: Path, method: str, options: tuple[str, ...], message: str
) -> None:
    result = by_method(tmp_path / "nowhere", method, "--budget", "0.6", *options, "--out", str(tmp_path / "small"))
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_method_on_two_workers_decides_as_on_one(source: Path, tmp_path: Path) -> None:
    settings = ("--budget", "0.6", *QUICK, "--finetune", "none", "--set", "warmup_epochs=0", "--set", "ramp_steps=8")
    archs = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        result = by_method(source, "uvc", *settings, "--workers", workers, "--out", str(out))
        assert result.exit_code == 0, (result.output, result.exception)
        archs.append(arch_of(load(out)))
    assert archs[0] == archs[1]


def test_show_prints_blocks_and_draws_tokens(source: Path, tmp_path: Path) -> None:
    planned = by_method(source, "pmvit", "--keep-rate", "0.5", "--out", str(tmp_path / "a"), "--cache", str(tmp_path))
    assert planned.exit_code == 0, (planned.output, planned.exception)
    Image.new("L", (8, 8), 200).save(tmp_path / "x.png")
    shown = runner.invoke(app, ["show", str(tmp_path / "a"), "--tokens", str(tmp_path / "x.png")])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert f"{cost(arch_of(load(tmp_path / 'a'))).macs:,} MACs" in shown.output
    assert Image.open(tmp_path / "a-tokens.png").width > 200
    (tmp_path / "y.png").write_text("no picture")
    broken = runner.invoke(app, ["show", str(tmp_path / "a"), "--tokens", str(tmp_path / "y.png")])
    assert "is no image that can be read" in str(broken.exception)


def test_a_family_that_a_method_does_not_serve_is_refused_before_weights_are_fetched(tmp_path: Path) -> None:
    """Its weights cannot be fetched here, which would be said otherwise."""
    arguments = ["prune", "pvt_v2_b0", "--data", "digits", "--method", "spvit", "--budget", "0.5"]
    refused = runner.invoke(app, [*arguments, "--out", str(tmp_path / "small")])
    assert "method 'spvit' serves families" in str(refused.exception)
    assert "it lacks 'mixers': its values are of a reduced map" in str(refused.exception)
