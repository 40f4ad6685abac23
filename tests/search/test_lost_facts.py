"""A run whose main file is lost or damaged is resumed from what its other files know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunesweep.models import UserError
from prunesweep.search import resume_search, run_search
from prunesweep.search.execution.reopen import reopen
from prunesweep.search.store.run import Run
from tests.conftest import tiny_config
from tests.search.in_process import without_ray


@pytest.mark.slow
def test_run_json_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    run_search(tiny_config(search={"trials": 2, "recover": False}), tmp_path / "run")
    run, said = Run(tmp_path / "run"), list[str]()
    before, results = run.metadata(), run.results()
    (run / "run.json").write_text('{"source": ')
    reopen(run, on_note=said.append)
    assert "run.json" in said[0]
    assert "kept as run.json.damaged-1, and written again from source/, scores/ and search.toml" in said[0]
    after = run.metadata()
    assert {**after, "content": before["content"], "versions": before["versions"]} == before
    (run / "run.json").unlink()
    result = resume_search(run.path, trials=3)
    assert result.finished
    assert Run(run.path).results()[:2] == results
    assert len(Run(run.path).results()) == 3

    file = next((run / "scores").glob("nvit-*.safetensors"))
    file.rename(file.with_name("gone"))
    (run / "run.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="put the file back from a copy of the run"):
        reopen(Run(run.path))
    assert json.loads((run / "run.json").read_text()) == {}
