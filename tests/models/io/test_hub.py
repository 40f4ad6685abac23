from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import huggingface_hub
import pytest
import timm
import torch

from prunesweep.models import UserError, arch_of, cost, load, load_provenance, save
from prunesweep.models.io.hub import push
from tests.generate import random_arch, random_model

MODEL = random_model(random_arch(Random(3)), 3, torch.float32)


class Hub:
    """As much of the Hugging Face Hub as a push needs: one repository, whose files are kept in ``files``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.created: dict[str, Any] = {}
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Authorization"] != "Bearer secret":
                    return self.answer(401, {"error": "Invalid token"})
                return self.answer(hub.status, hub.post(self.path, body))

            def do_HEAD(self) -> None:
                content = hub.files.get(self.path.rsplit("/", 1)[1])
                self.send_response(404 if content is None else 200)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
                self.send_header("Content-Length", str(len(content or b"")))
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                self.wfile.write(hub.files[self.path.rsplit("/", 1)[1]])

            def answer(self, status: int, content: Any) -> None:
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.url}/me/small"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            sent = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in sent]}
        assert path == "/api/models/me/small/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits += 1
        return {"commitUrl": f"{self.url}/me/small/commit/1", "commitOid": "1" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)  # HF_ENDPOINT is read at import
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setenv("HF_TOKEN", "secret")
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(MODEL, tmp_path / "model", {"method": "nvit", "top1": 81.5})


def test_a_pushed_folder_is_what_was_saved(hub: Hub, saved: Path, tmp_path: Path) -> None:
    assert push(saved, "me/small", private=True) == f"{hub.url}/me/small/commit/1"
    assert (hub.created["name"], hub.created["organization"], hub.created["visibility"]) == ("small", "me", "private")
    assert hub.commits == 1
    readme = hub.files.pop("README.md").decode()
    assert hub.files == {p.name: p.read_bytes() for p in saved.iterdir()}
    for text in ("library_name: timm", "hf-hub:me/small", f"{cost(arch_of(MODEL)).macs:,}", "| 81.5 |", '"nvit"'):
        assert text in readme


def test_timm_loads_a_pushed_model(hub: Hub, saved: Path, tmp_path: Path) -> None:
    push(saved, "me/small")
    model = timm.create_model("hf-hub:me/small", pretrained=True, cache_dir=tmp_path / "cache")
    assert arch_of(model) == arch_of(MODEL)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in MODEL.state_dict().items())


def test_a_model_is_saved_first_and_a_readme_that_is_there_stays(hub: Hub, tmp_path: Path) -> None:
    hub.files["README.md"] = b"mine"
    push(MODEL, "me/small")
    assert hub.files.pop("README.md") == b"mine"
    (tmp_path / "got").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "got" / name).write_bytes(content)
    weights = load(tmp_path / "got").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in MODEL.state_dict().items())
    assert load_provenance(tmp_path / "got") == {}


@pytest.mark.parametrize("repo_id", ["small", "me/a/b", "me/a b", "me/.a", ""])
def test_a_bad_repo_id_is_refused(repo_id: str, hub: Hub, saved: Path) -> None:
    with pytest.raises(UserError, match=f"repo_id = '{repo_id}': must be OWNER/NAME"):
        push(saved, repo_id)
    assert hub.created == {}


def test_a_missing_login_is_named(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="not logged in"):
        push(saved, "me/small")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="cannot push to me/small: .*401"):
        push(saved, "me/small")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.status = 403
    with pytest.raises(UserError, match="cannot push to me/small: .*403"):
        push(saved, "me/small")


def test_a_damaged_folder_is_not_pushed(hub: Hub, saved: Path) -> None:
    with (saved / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        push(saved, "me/small")
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="is not a saved model"):
        push(saved, "me/small")
    assert hub.created == {}
