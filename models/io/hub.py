"""Sharing a saved model on the Hugging Face Hub.

timm's own ``push_to_hf_hub`` writes the weights anew, without the record beside them and as a pickle too; here the
files of ``models.save`` are uploaded as they are, in one commit.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import arch_of
from prunesweep.models.counting import cost
from prunesweep.models.errors import UserError

from .scratch import scratch_folder
from .store import CONFIG, WEIGHTS, load, load_provenance, save

__all__ = ["card", "push"]


def push(model: nn.Module | str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model, and a README where the repository has none; return the URL of the commit.

    Args:
        model: a folder that ``models.save`` wrote, checked first; or a model, which is saved first.
        repo_id: ``OWNER/NAME``; a repository that does not exist is made.
        private: whether a new repository is private.

    Raises:
        UserError: the folder is damaged, ``repo_id`` is not one, there is no login, or the hub refuses.
    """
    _check(repo_id)
    if isinstance(model, nn.Module):
        with scratch_folder() as scratch:
            return _upload(save(model, scratch / "model"), repo_id, private)
    return _upload(Path(model), repo_id, private)


def _check(repo_id: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public all the same

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id = {repo_id!r}: must be OWNER/NAME. {error}") from error
    if "/" not in repo_id:
        raise UserError(f"repo_id = {repo_id!r}: must be OWNER/NAME, your user name or organisation in front")
    if get_token() is None:
        raise UserError("not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client

    readme = card(repo_id, arch_of(load(folder)), load_provenance(folder))
    additions = [CommitOperationAdd(name, folder / name) for name in (CONFIG, WEIGHTS)]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not api.file_exists(repo_id, "README.md"):
            additions.append(CommitOperationAdd("README.md", readme.encode()))
        return api.create_commit(repo_id, additions, commit_message="Add model").commit_url
    except (HTTPError, OSError) as error:
        raise UserError(
            f"cannot push to {repo_id}: {error}\nCheck the name, the connection, and that your token may write there"
        ) from error


def card(repo_id: str, arch: Arch, provenance: dict[str, object]) -> str:
    """Write the README of a model, with the metadata that the hub reads.

    Args:
        repo_id: ``OWNER/NAME`` of the repository.
        arch: the model's record.
        provenance: facts as ``save`` stores them; ``method``, ``top1`` and ``cosine`` are shown where they are known.

    Returns:
        The Markdown text.
    """
    spent = cost(arch)
    task = "image-feature-extraction" if arch.headless else "image-classification"
    facts = {
        "source model": arch.source,
        "images": f"{arch.img_size[0]} x {arch.img_size[1]}, {arch.in_chans} channels",
        ("features" if arch.headless else "classes"): f"{arch.outputs:,}",
        "MACs": f"{spent.macs:,}",
        "params": f"{spent.params:,}",
        "method": provenance.get("method"),
        "top-1 (%)": provenance.get("top1"),
        "cosine to the source's features": provenance.get("cosine"),
    }
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items() if fact is not None)
    return f"""---
library_name: timm
pipeline_tag: {task}
tags:
- {task}
- timm
- prunesweep
---
# {repo_id.split("/")[1]}

A compressed vision transformer (family `{arch.family}`).

| | |
|---|---|
{rows}

```python
import prunesweep, timm  # prunesweep lets timm know the architecture

model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
```

Where the weights come from:

```json
{json.dumps(provenance, indent=1)}
```
"""
