"""Models for other runtimes; every artefact is run and compared with the model before it gets its name.

    error = export(model, "small.onnx", "onnx")

``torch-export`` is a ``.pt2`` file that loads with torch alone, ``onnx`` an ONNX file for ONNX Runtime, ``timm`` the
folder of ``models.save``. All take any number of images, (B, C, rows, columns) float32 normalised as the model's
``pretrained_cfg`` says, and return logits (B, K), or features of a backbone without a head. The first two carry the
record and the preprocessing as JSON: ``arch.json`` and ``preprocessing.json`` among the extra files of the ``.pt2``,
``arch`` and ``preprocessing`` in the metadata of the ONNX file. A language model's take any number of texts, (B, T)
int64 word numbers, T being the length that its record says, and return log-probabilities (B, T, V).
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn

from prunesweep.models.builder import arch_of, example_input
from prunesweep.models.errors import UserError, nearest

from .files import make_folder, publish, write_refused
from .store import rebuilt, save

__all__ = ["FORMATS", "OPSETS", "default_path", "export"]

OPSETS = range(18, 24)  # what torch's exporter writes
ONNX_LIMIT = 2**31  # bytes of a protobuf message, which an ONNX file is
BATCHES = (1, 3)  # neither is the batch of the example that is traced

Run = Callable[[torch.Tensor], torch.Tensor]


class Format(NamedTuple):
    """One format: ``write(model, path, opset)`` writes an artefact, ``open(path)`` returns a function that runs it."""

    suffix: str
    write: Callable[[nn.Module, Path, int], None]
    open: Callable[[Path], Run]


def export(model: nn.Module, path: str | Path, to: str, *, opset: int = 20, tolerance: float = 1e-4) -> float:
    """Write ``model`` as ``to``, run what was written on random images, and publish it if both agree.

    Args:
        model: one of ours, or a timm model that ``Arch.from_timm`` accepts; it is not changed. The artefact computes on
            the CPU's float32, whatever the model's device and dtype; ``timm`` stores the weights as they are.
        path: the file, or for ``timm`` the folder; it must not exist yet, missing parents are made.
        to: ``torch-export``, ``onnx`` or ``timm``.
        opset: version of the ONNX operators, 18..23; 23 has attention as one operator.
        tolerance: the largest difference allowed, relative to max(1, the largest logit's magnitude).

    Returns:
        The largest absolute difference of a logit, over batches of 1 and 3 images.

    Raises:
        UserError: ``to`` or ``opset`` is unknown, ``path`` exists or cannot be written, the packages of the extra
            ``export`` are not installed, the model cannot be represented or is too large for the format, or the
            artefact computes something else. Then nothing is left behind.
    """
    form, path = _format(to), Path(path)
    if to == "onnx":
        _check_onnx(opset)
    if path.exists():
        raise UserError(f"{path} is there already; remove it or give a new path")
    reference = copy.deepcopy(model).cpu().float().eval()
    ours = rebuilt(reference).eval()
    place = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=place, prefix=".export-") as scratch:
            # no_grad: with gradients, Swin's biases are traced with another attention kernel than ONNX's lowering has
            artefact = Path(scratch) / f"model{form.suffix}"
            form.write(model if to == "timm" else ours, artefact, opset)
            error = _largest_error(reference, form.open(artefact), tolerance, to)
            make_folder(path.parent)
            publish(artefact, path, replace=False)
    except (OSError, SafetensorError) as failure:
        what_to_do = write_refused(failure)
        raise UserError(f"cannot write {path}: {failure}" + (f"; {what_to_do}" if what_to_do else "")) from failure
    return error


def default_path(model: str | Path, to: str) -> Path:
    """Return the path of an artefact beside a saved model's folder, with the format's suffix.

    Args:
        model: the folder of the saved model.
        to: ``torch-export``, ``onnx`` or ``timm``.

    Raises:
        UserError: ``to`` is unknown.
    """
    return Path(os.path.normpath(Path(model).absolute()) + _format(to).suffix)


def _format(to: str) -> Format:
    if to not in FORMATS:
        raise UserError(f"to = {to!r}: must be one of {', '.join(FORMATS)}. {nearest(to, FORMATS)}".strip())
    return FORMATS[to]


def _check_onnx(opset: int) -> None:
    """Raise UserError where torch has no such operators, or a package is missing."""
    if opset not in OPSETS:
        raise UserError(f"opset = {opset}: must lie in {OPSETS[0]}..{OPSETS[-1]}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"export to onnx needs the package {package} ({error}); install it with: pip install -e '.[export]'"
            ) from error


def _largest_error(reference: nn.Module, run: Run, tolerance: float, to: str) -> float:
    """Return the largest absolute difference between the logits of ``reference`` and ``run``.

    Raises UserError where it is above the tolerance.
    """
    arch, largest = arch_of(reference), 0.0
    for batch in BATCHES:
        expected = reference(images := example_input(arch, batch, seed=batch))
        if not expected.isfinite().all():
            raise UserError("the model's own logits are not finite on random images; nothing can be compared with them")
        error = (run(images) - expected).abs().max().item()
        allowed = tolerance * max(1.0, expected.abs().max().item())
        if not error <= allowed:  # nan is an error too
            raise UserError(
                f"the {to} artefact computes something else: at batch {batch} its logits are off by {error:.2g}, "
                f"allowed is {allowed:.2g}; nothing was written"
            )
        largest = max(largest, error)
    return largest


def _facts(model: nn.Module) -> dict[str, str]:
    """Collect what a user of the artefact must know, as JSON texts."""
    facts = {"arch": arch_of(model).to_dict(), "preprocessing": resolve_model_data_config(model)}
    return {name: json.dumps(fact) for name, fact in facts.items()}


def _write_torch_export(model: nn.Module, path: Path, _: int) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example_input(arch_of(model), 2, seed=2),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's files, and is a good part of a small artefact
    files = {f"{name}.json": text for name, text in _facts(model).items()}
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=files)
    path.write_bytes(content.getbuffer())  # on a full disk torch's own writer ends the process


def _open_torch_export(path: Path) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _write_onnx(model: nn.Module, path: Path, opset: int) -> None:
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UserError(f"the weights are {size:,} bytes, an ONNX file holds {ONNX_LIMIT:,}; export to torch-export")
    arch = arch_of(model)
    program = torch.onnx.export(
        model,
        (example_input(arch, 2, seed=2),),
        dynamic_shapes=({0: "batch"},),
        input_names=["images" if arch.text is None else "words"],
        output_names=["features" if arch.headless else "logits"],
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    if program is None:  # torch's annotation allows for its older exporter
        raise RuntimeError("torch.onnx.export returned no program")
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, as above
    program.model.metadata_props.update(_facts(model))
    program.save(path, external_data=False)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _write_timm(model: nn.Module, path: Path, _: int) -> None:
    save(model, path)


def _open_timm(path: Path) -> Run:
    run: Run = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return run


FORMATS = {
    "torch-export": Format(".pt2", _write_torch_export, _open_torch_export),
    "onnx": Format(".onnx", _write_onnx, _open_onnx),
    "timm": Format("-timm", _write_timm, _open_timm),
}
