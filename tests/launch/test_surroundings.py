"""Commands where little is as usual: odd paths, no HOME, another locale, a strict umask, few files, a deep TMPDIR."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch

from prunesweep.models import save
from tests.search.execution.test_task import folder_config, small_timm

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an odd name, seen through a link, in which ``tmp`` is too deep for sockets."""
    real = tmp_path / "räume & [co]" / "real"
    (real / ("tmp" * 20)).mkdir(parents=True)
    (real.parent / "link").symlink_to(real)
    return real.parent / "link"


def start(place: Path, arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command of the command line in ``place``, whose output is one stream; Ctrl-C reaches all it starts."""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"LC_ALL": "C", "TMPDIR": str(place / ("tmp" * 20)), "OMP_NUM_THREADS": "1", **variables}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be ignored where tests run
    code += "from prunesweep.launch.cli import main; main()"
    limited = ["bash", "-c", 'ulimit -n 256; umask 077; exec "$@"', "bash", sys.executable, "-c", code, *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(limited, cwd=place, env=environment, encoding="utf-8", **options)  # type: ignore[call-overload,no-any-return]


def left(place: Path) -> list[str]:
    """What processes have left among temporary files."""
    others = ("torchinductor", "wandb")  # of libraries: timm loads wandb where that is installed
    names = [path.name for path in (place / ("tmp" * 20)).iterdir()]
    return [name for name in names if not any(other in name for other in others)]


def test_a_search_where_little_is_as_usual(place: Path, image_folder: Path) -> None:
    data = place / "données [1] & 2"
    image_folder.rename(data)
    save(small_timm(), place / "source")
    config = folder_config(data, {"model": f"local-dir:{place / 'source'}"})
    search = config.search.model_copy(update={"trials": 1})
    resources = config.resources.model_copy(update={"cpus": 1})
    file = place / "ä b.toml"
    file.write_text(config.model_copy(update={"search": search, "resources": resources}).to_toml(), encoding="utf-8")
    begun = start(place, ["search", file.name, "--out", "läufe & [x]/run 1"])
    output, _ = begun.communicate(timeout=300)
    assert begun.returncode == 0, output
    run = place / "läufe & [x]" / "run 1"
    (model,) = (run / "front").iterdir()
    assert stat.S_IMODE((model / "model.safetensors").stat().st_mode) == 0o600
    timm.create_model(f"local-dir:{model}", pretrained=True)
    assert left(place) == []
    shown = start(place, ["front", str(run.relative_to(place))], PYTHONIOENCODING="ascii")
    assert "epochs" in shown.communicate(timeout=60)[0]
    assert shown.returncode == 0


def test_ctrl_c_of_training_on_workers(place: Path) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape), place / "modell")
    memory = set(os.listdir("/dev/shm"))
    options = ["--data", "digits", "--teacher", model.name, "--epochs", "999", "--workers", "2"]
    training = start(place, ["finetune", model.name, "--out", "ergebnis & [x]", *options])
    assert training.stdout is not None
    seen = list[str]()
    for line in training.stdout:
        seen.append(line)
        if "epoch 1/" in line or "epoch 2/" in line:
            break
    os.killpg(training.pid, signal.SIGINT)
    output, _ = training.communicate(timeout=60)
    assert training.returncode == 130, "".join(seen) + output
    (work,) = place.resolve().glob(".ergebnis*")
    assert output.splitlines()[-1] == f"interrupted; the same command goes on from what is saved in {work}"
    assert "Traceback" not in output
    assert left(place) == []
    assert set(os.listdir("/dev/shm")) <= memory
