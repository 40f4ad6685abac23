"""Models for other runtimes; every artefact is run and compared with the model before it gets its name.

    error = export(model, "small.onnx", "onnx")

``torch-export`` is a ``.pt2`` file that loads with torch alone, ``onnx`` an ONNX file for ONNX Runtime, ``timm`` the
folder of ``models.save``, ``standalone`` a folder with a file of plain PyTorch beside the
weights. All take any number of images, (B, C, rows, columns) float32 normalised as the model's
``pretrained_cfg`` says, and return logits (B, K), or features of a backbone without a head. The first two carry the
record and the preprocessing as JSON: ``arch.json`` and ``preprocessing.json`` among the extra files of the ``.pt2``,
``arch`` and ``preprocessing`` in the metadata of the ONNX file. A language model's take any number of texts, (B, T)
int64 word numbers, T being the length that its record says, and return log-probabilities (B, T, V).

An ONNX file may compute in another precision (``PRECISIONS``); its inputs and outputs stay float32. ``float16`` has all
weights in half precision. ``int8-dynamic`` has the weights of linear layers in 8 bits, one scale per output, and scales
activations as it runs; ``int8-static`` has scales of activations, too, measured beforehand on images of yours.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.builder import arch_of, blocks_of, example_input
from prunesweep.models.errors import UserError, nearest
from prunesweep.models.fuse import for_inference
from prunesweep.models.layers.token_merging import SparseMerge

from .files import make_folder, publish, scratch_beside, write_refused
from .standalone import open_standalone, write_standalone
from .store import rebuilt, save

__all__ = ["FORMATS", "OPSETS", "PRECISIONS", "Agreement", "agreement", "check_export", "default_path", "export"]

OPSETS = range(18, 24)  # what torch's exporter writes
ONNX_LIMIT = 2**31  # bytes of a protobuf message, which an ONNX file is
# of ONNX files: the largest difference of a logit that is let pass, relative to the largest logit, as for ``tolerance``
PRECISIONS = {"float32": 1e-4, "float16": 3e-2, "int8-dynamic": 1.0, "int8-static": 1.0}
BATCHES = (1, 3)  # neither is the batch of the example that is traced

Run = Callable[[torch.Tensor], torch.Tensor]


class Format(NamedTuple):
    """One format: ``write(model, path, opset)`` writes an artefact, ``open(path)`` returns a function that runs it."""

    suffix: str
    write: Callable[[nn.Module, Path, int], None]
    open: Callable[[Path], Run]


class Agreement(NamedTuple):
    """How far an artefact's answers on images are the model's.

    ``same`` is the share of equal answers in percent, ``kl`` the mean divergence in nats, ``images`` their number.
    """

    same: float
    kl: float
    images: int


def export(
    model: nn.Module,
    path: str | Path,
    to: str,
    *,
    opset: int = 20,
    tolerance: float | None = None,
    precision: str = "float32",
    calibration: Iterable[torch.Tensor] | None = None,
    fused: bool = False,
) -> float:
    """Write ``model`` as ``to``, run what was written on random images, and publish it if both agree.

    Args:
        model: one of ours, or a timm model that ``Arch.from_timm`` accepts; it is not changed. The artefact computes on
            the CPU's float32, whatever the model's device and dtype; ``timm`` stores the weights as they are.
        path: the file, or for ``timm`` and ``standalone`` the folder; it must not exist yet, missing parents are made.
        to: ``torch-export``, ``onnx``, ``timm`` or ``standalone``.
        opset: version of the ONNX operators, 18..23; 23 has attention as one operator.
        tolerance: the largest difference allowed, relative to max(1, the largest logit's magnitude); by default that of
            ``PRECISIONS``: 1e-4 for float32, and for int8 as much as the largest logit.
        precision: of an ONNX file, a key of ``PRECISIONS``.
        calibration: batches of images (B, C, rows, columns), prepared as for evaluation, from which ``int8-static``
            measures the ranges of activations; a few hundred images will do.
        fused: leave out what the logits do not need, see ``models.fuse.for_inference``; not for ``timm``.

    Returns:
        The largest absolute difference of a logit, over batches of 1 and 3 images: random ones, or of ``calibration``.

    Raises:
        UserError: ``to``, ``opset`` or ``precision`` is unknown, or does not go with ``to`` or the model's family,
            ``path`` exists or cannot be written, the packages of the extra ``export`` are not installed, the model
            cannot be represented or is too large for the format, or the artefact computes something else. Then nothing
            is left behind.
    """
    form, path = _format(to), Path(path)
    arch = arch_of(model)
    check_export(arch, path, to, opset=opset, precision=precision, calibrated=calibration is not None, fused=fused)
    tolerance = PRECISIONS[precision] if tolerance is None else tolerance
    images = None if calibration is None else list(calibration)
    reference = copy.deepcopy(model).cpu().float().eval()
    ours: Any = rebuilt(reference).eval()
    if fused:
        ours = for_inference(ours, plans=to != "onnx")  # whose runtimes refuse how plans are fused
        ours.arch = arch
    place = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with torch.no_grad(), scratch_beside(place / path.name) as scratch:
            # no_grad: with gradients, Swin's biases are traced with another attention kernel than ONNX's lowering has
            artefact = scratch / f"model{form.suffix}"
            write = partial(_write_onnx, half=True) if precision == "float16" else form.write
            write(model if to == "timm" else ours, artefact, opset)
            if precision.startswith("int8"):
                _quantise(artefact, precision, images)
            error = _largest_error(reference, form.open(artefact), tolerance, to, images)
            make_folder(path.parent)
            publish(artefact, path, replace=False)
    except (OSError, SafetensorError) as failure:
        what_to_do = write_refused(failure)
        raise UserError(f"cannot write {path}: {failure}" + (f"; {what_to_do}" if what_to_do else "")) from failure
    return error


def check_export(
    arch: Arch, path: Path, to: str, *, opset: int, precision: str, calibrated: bool, fused: bool = False
) -> None:
    """Check all that ``export`` can tell from a record, before a model is loaded.

    Args:
        arch: the model's record.
        path, to, opset, precision, fused: as for ``export``.
        calibrated: whether there are images to measure activations on.

    Raises:
        UserError: as for ``export``.
    """
    _format(to)
    _check_precision(arch, to, precision, calibrated)
    if fused and to == "timm":
        raise UserError("fused: is for torch-export, onnx and standalone; timm's models compute all tokens")
    if to == "onnx":
        _check_onnx(opset)
    if path.exists():
        raise UserError(f"{path} is there already; remove it or give a new path")


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


def agreement(model: nn.Module, path: str | Path, to: str, batches: Iterable[torch.Tensor]) -> Agreement:
    """Compare an artefact's answers with its model's on images that matter.

    Args:
        model: the classifier that was exported, on the CPU.
        path: what ``export`` wrote.
        to: its format.
        batches: images (B, C, rows, columns), prepared as for evaluation.

    Raises:
        UserError: ``to`` is unknown, or the model gives features.
    """
    if arch_of(model).headless:
        raise UserError("a backbone without a head gives no answers to compare")
    run, reference = _format(to).open(Path(path)), copy.deepcopy(model).float().eval()
    same = images = 0
    divergence = 0.0
    with torch.no_grad():
        for x in batches:
            ours, theirs = reference(x).log_softmax(-1), run(x).log_softmax(-1)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            divergence += float((ours.exp() * (ours - theirs)).sum())
            images += len(x)
    return Agreement(100 * same / max(images, 1), divergence / max(images, 1), images)


def _check_precision(arch: Arch, to: str, precision: str, calibrated: bool) -> None:
    """Raise UserError where there is no such artefact, or what it needs is not given."""
    if precision not in PRECISIONS:
        hint = nearest(precision, PRECISIONS)
        raise UserError(f"precision = {precision!r}: must be one of {', '.join(PRECISIONS)}. {hint}".strip())
    if precision != "float32" and to != "onnx":
        raise UserError(f"precision = {precision!r}: is for onnx; {to} keeps the type of the weights")
    if precision != "float32" and arch.text is not None:
        raise UserError(f"precision = {precision!r}: is for models of images, {arch.source} is a language model")
    if (precision == "int8-static") != calibrated:
        need = "measures no activations" if calibrated else "needs images to measure activations on (--data)"
        raise UserError(f"precision = {precision!r}: {need}")


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


def _largest_error(
    reference: nn.Module, run: Run, tolerance: float, to: str, given: Sequence[torch.Tensor] | None = None
) -> float:
    """Return the largest absolute difference between the logits of ``reference`` and ``run``.

    The images are random, or the first of those ``given``: ranges that were measured fit no others.

    Raises UserError where it is above the tolerance.
    """
    arch, largest = arch_of(reference), 0.0
    for batch in BATCHES:
        images = example_input(arch, batch, seed=batch) if given is None else given[0][:batch]
        expected = reference(images)
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


class _ConstantPlan(nn.Module):
    """A token plan by constants: M is one matrix product, R a gather; scattering is what runtimes refuse."""

    def __init__(self, plan: SparseMerge) -> None:
        super().__init__()
        matrix, _, takes_part = plan.matrices()
        weight = plan.recover.detach() * takes_part
        self.matrix, self.source = nn.Buffer(matrix.detach()), nn.Buffer(plan.assign.clamp(min=0))
        self.weight, self.passes = nn.Buffer(weight[:, None]), nn.Buffer((~takes_part[:, None]).to(weight.dtype))

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Compute M x: (B, N, D) to (B, c, D)."""
        return self.matrix @ x

    def spread(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute R z + (1 - m) x: (B, c, D) and (B, N, D) to (B, N, D)."""
        return z.index_select(1, self.source) * self.weight + self.passes * x


def _with_constant_plans(model: nn.Module) -> nn.Module:
    """Put constants in the place of a model's sparse token plans, and return it."""
    for block in blocks_of(model):
        if isinstance(plan := getattr(block, "token_merge", None), SparseMerge):
            block.token_merge = _ConstantPlan(plan)
    return model


class _InHalf(nn.Module):
    """A model in half precision whose inputs and outputs are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, K) from images."""
        answers: torch.Tensor = self.model(x.half())
        return answers.float()


class _Batches:
    """Batches of images as onnxruntime's quantisation asks for them."""

    def __init__(self, name: str, batches: Iterable[torch.Tensor]) -> None:
        self.name, self.batches = name, iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by the input's name; None behind the last one."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def _quantise(path: Path, precision: str, calibration: Iterable[torch.Tensor] | None) -> None:
    """Quantise the linear layers and convolutions of an ONNX file in place."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    given, read = path.with_suffix(".float.onnx"), onnx.load(path)
    facts, ranks = read.metadata_props, {weight.name: len(weight.dims) for weight in read.graph.initializer}
    # products with a matrix for every row or column, as of relative positions, have no integer form in onnxruntime
    stacked = [node.name for node in read.graph.node if any(ranks.get(name, 2) > 2 for name in node.input)]
    path.rename(given)
    kinds = ["MatMul", "Gemm"]
    if calibration is None:
        quantize_dynamic(
            given,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=kinds,
            nodes_to_exclude=[name for name in stacked if name],
        )
    else:
        quantize_static(
            given,
            path,
            _Batches("images", calibration),
            quant_format=QuantFormat.QDQ,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            per_channel=True,
            op_types_to_quantize=[*kinds, "Conv"],
            calibrate_method=CalibrationMethod.MinMax,
        )
    given.unlink()
    made = onnx.load(path)
    known = {prop.key for prop in made.metadata_props}
    made.metadata_props.extend(prop for prop in facts if prop.key not in known)
    onnx.save(made, path)


def _write_onnx(model: nn.Module, path: Path, opset: int, *, half: bool = False) -> None:
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UserError(f"the weights are {size:,} bytes, an ONNX file holds {ONNX_LIMIT:,}; export to torch-export")
    arch, facts = arch_of(model), _facts(model)
    planned = _with_constant_plans(model)
    program = torch.onnx.export(
        _InHalf(planned) if half else planned,
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
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _write_standalone(model: nn.Module, path: Path, _: int) -> None:
    write_standalone(model, path, example_input(arch_of(model), 2, seed=2), _facts(model))


def _write_timm(model: nn.Module, path: Path, _: int) -> None:
    save(model, path)


def _open_timm(path: Path) -> Run:
    run: Run = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return run


FORMATS = {
    "torch-export": Format(".pt2", _write_torch_export, _open_torch_export),
    "onnx": Format(".onnx", _write_onnx, _open_onnx),
    "timm": Format("-timm", _write_timm, _open_timm),
    "standalone": Format("-standalone", _write_standalone, open_standalone),
}
