from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunesweep.models import arch_of, cost, load, load_provenance
from prunesweep.models.importers import import_checkpoint
from tests.launch.test_cli import call

DATA = Path(__file__).parents[1] / "golden" / "data" / "import"


def test_import_saves_a_model_with_its_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = DATA / "uvc_stage1_dev.pth", tmp_path / "model"
    code, text, _ = call(capsys, "import", file, "--as", "uvc", "--heads", "3", "--img-size", "32", "--out", out)
    assert code == 0
    model = load(out)
    spent = cost(arch_of(model))
    assert f"{spent.macs:,} MACs, {spent.params:,} params; saved as {out}" in text
    assert "images of 32 x 32, width 36, 10 classes" in text
    assert load_provenance(out) == {
        "method": "import",
        "layout": "uvc",
        "file": "uvc_stage1_dev.pth",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "ema": False,
    }
    tensors = load_file(DATA / "uvc_stage1_dev.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["inputs"]).double(), tensors["logits"], rtol=0, atol=1e-4)


def test_switches_reach_the_importer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = DATA / "nvit_full_dev.pth", tmp_path / "nvit"
    assert call(capsys, "import", file, "--as", "nvit", "--trust", "--ema", "--out", out)[0] == 0
    assert load_provenance(out)["ema"] is True
    want = import_checkpoint(file, "nvit", trust=True, ema=True).state_dict()
    got = load(out).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    file, out = DATA / "upvit_pvt_dev.pth", tmp_path / "pvt"
    assert call(capsys, "import", file, "--as", "upvit", "--heads", "1,2,5,8", "--img-size", "32", "--out", out)[0] == 0
    assert [stage.blocks[0].heads for stage in arch_of(load(out)).stages] == [1, 2, 5, 8]
    file, out = DATA / "spvit_swin_mixed_dev.pth", tmp_path / "swin"
    config = DATA / "spvit_swin_mixed_dev_config.yaml"
    code, text, _ = call(capsys, "import", file, "--as", "spvit", "--config", config, "--out", out)
    assert code == 0
    assert "conv3x3" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{data}/absent.pth", "--as", "upvit"], "absent.pth is not a file"),
        (["{data}/upvit_dev.pth", "--as", "upvti", "--heads", "3"], "did you mean 'upvit'?"),
        (["{data}/upvit_dev.pth", "--as", "upvit"], "give heads (--heads N)"),
        (["{data}/upvit_dev.pth", "--as", "upvit", "--heads", "three"], "--heads three: must be a whole number"),
        (["{data}/upvit_dev.pth", "--as", "nvit"], "from the file's entry 'dim'"),
        (["{data}/pmvit_full_dev.pth", "--as", "pmvit", "--heads", "3"], "argparse.Namespace"),
        (["{data}/spvit_deit_mixed_dev.pth", "--as", "spvit"], "--config FILE"),
    ],
)
def test_errors_are_one_message_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    code, text, error = call(capsys, "import", *(a.format(data=DATA) for a in arguments), "--out", out)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in text + error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("kept")
    code, _, error = call(capsys, "import", DATA / "nvit_dev.pth", "--as", "nvit", "--out", tmp_path)
    assert code == 2
    assert "is there already" in error
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
