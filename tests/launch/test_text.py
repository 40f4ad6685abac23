"""The commands on a language model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from prunesweep.launch.cli import app
from prunesweep.models import arch_of, build, cost, load, load_provenance, save
from prunesweep.models.families.lm import lm_arch
from prunesweep.models.io.store import read_arch
from prunesweep.training import EVAL_BATCH, evaluate, open_data, open_text
from tests.generate import random_images

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "import" / "fairseq_lm_full_dev.pth"
SMALL = ("--group", "embed=2", "--group", "heads=1", "--group", "dim=2", "--group", "mlp=4", "--group", "tail=1")
runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = open_data("pydocs").info
    known = {"words": words.num_classes, "vocabulary": words.vocabulary, "length": 16}
    torch.manual_seed(0)
    model = build(lm_arch(cutoffs=(150, 600), width=16, depth=2, heads=2, mlp=32, **known))
    return save(model, tmp_path_factory.mktemp("source") / "model", {"method": "source"})


def test_prune_finetune_and_evaluate(source: Path, tmp_path: Path) -> None:
    small, cache = tmp_path / "small", tmp_path / "scores"
    found = json.loads(
        run(
            *("prune", source, "--method", "upvit", "--data", "pydocs", "--measure", "params", "--budget", 0.7),
            *("--out", small, "--cache", cache, "--images", 32, "--drop", 1, *SMALL, "--json"),
        )
    )
    arch = arch_of(load(small))
    assert found["params"] == cost(arch).params <= 0.7 * cost(read_arch(source)).params
    assert arch.depth == 1
    data = open_data("pydocs", load(small).pretrained_cfg)
    ppl = evaluate(load(small), data.val_loader(EVAL_BATCH))["ppl"]
    assert found["ppl"] == ppl == load_provenance(small)["ppl"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('epochs = 1\nbatch_size = 512\nlr = 0.01\n[[distill]]\nteacher = "source"\n')
    tuned = tmp_path / "tuned"
    out = run("finetune", small, "--teacher", source, "--data", "pydocs", "--recipe", recipe, "--out", tuned)
    better = load_provenance(tuned)["ppl"]
    assert f"ppl {better:.2f}, {cost(arch).macs:,} MACs" in out
    assert better < 0.5 * ppl
    texts = open_text("pydocs", {}, length=24, context=8)
    want = evaluate(load(tuned), texts.val_loader(EVAL_BATCH, split="test"))
    shown = json.loads(run("eval", tuned, "--data", "pydocs", "--test", "--length", 24, "--context", 8, "--json"))
    assert (shown["ppl"], shown["params"]) == (want["ppl"], cost(arch).params)
    assert math.isclose(want["ppl"], math.exp(want["loss"]))


def test_what_does_not_go_together_is_named(source: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = runner.invoke(app, [*map(str, arguments)])
        assert result.exit_code != 0
        return str(result.exception)

    assert "is a model of texts, data 'digits' are images" in refused("eval", source, "--data", "digits")
    assert "'digits' is no text" in refused("eval", source, "--data", "digits", "--test")
    prune = ("prune", source, "--budget", 0.5, "--out", tmp_path / "out", "--data")
    text = refused(*prune, "pydocs", "--method", "nvit")
    assert "adaptive_lm is a 'lm', for which there are: upvit, magnitude, random" in text
    assert "(of 'lm', it lacks 'images': it takes words)" in text
    assert "are images" in refused(*prune, "digits", "--method", "upvit")


@pytest.mark.parametrize("to", ["torch-export", "onnx", "timm"])
def test_export(source: Path, tmp_path: Path, to: str) -> None:
    found = json.loads(run("export", source, "--to", to, "--out", tmp_path / "model", "--json"))
    assert found["max_error"] < 1e-4
    if to == "torch-export":
        words = random_images(read_arch(source), 0, batch=5)
        with torch.no_grad():
            log_p = torch.export.load(tmp_path / "model").module()(words)
            np.testing.assert_allclose(log_p, load(source)(words), atol=1e-4)


def test_import_of_a_language_model(tmp_path: Path) -> None:
    out = run("import", GOLDEN, "--as", "fairseq", "--trust", "--out", tmp_path / "lm")
    assert "20, 20, 20 words by band" in " ".join(out.split())
    assert load(tmp_path / "lm").arch.blocks[0].heads == 4
