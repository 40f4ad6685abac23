"""Models as one file of plain PyTorch beside their weights, for where neither prunesweep nor timm is installed.

The folder has ``model.py`` (needs torch and safetensors alone), ``model.safetensors``, ``arch.json`` and
``preprocessing.json``. The file is what ``torch.export`` records of the model: one call of PyTorch a line, with names
of weights as in the model, for any number of images.

In one process on the CPU it computes bit for bit what the model computes, but for batches of one, for which PyTorch may
take other kernels: the last digit may differ.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.export.graph_signature import InputKind

from prunesweep.models.errors import UserError

__all__ = ["open_standalone", "write_standalone"]

KNOWN = ("device", "inf", "nan", "torch")  # names that the file imports, and an argument's
TEMPLATE = '''"""{title}

Written by prunesweep. Needs torch and safetensors alone; what it computes is one call of PyTorch a line:

    model = load("FOLDER")
    {outputs} = model({inputs})
"""

from math import inf, nan
from pathlib import Path

import torch
from safetensors.torch import load_file

NAMES = {{  # argument of forward -> name of the weight
{names}
}}


class Model(torch.nn.Module):
    """The model; ``tensors`` has its weights by name."""

    def __init__(self, tensors):
        super().__init__()
        for argument, name in NAMES.items():
            trained = tensors[name].is_floating_point()
            self.register_parameter(argument, torch.nn.Parameter(tensors[name], requires_grad=trained))

    def forward(self, {inputs}):
        return compute(*(getattr(self, argument) for argument in NAMES), {inputs})


def load(folder):
    """Return the model of this folder, in evaluation mode."""
    return Model(load_file(Path(folder) / "model.safetensors")).eval()


{function}'''


def write_standalone(model: nn.Module, folder: Path, example: torch.Tensor, facts: Mapping[str, str]) -> None:
    """Write the folder.

    Args:
        model: in float32 on the CPU, in evaluation mode.
        folder: to be made.
        example: an input of at least two images or texts.
        facts: texts of JSON files by name.

    Raises:
        UserError: this version of torch records something that the file cannot hold.
    """
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    weights, names, inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        argument, target = str(spec.arg.name), spec.target  # type: ignore[union-attr]  # constants without a name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(argument)
            continue
        assert target is not None  # of every other kind
        tensor = program.state_dict.get(target, program.constants.get(target))
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"standalone: {target} is no tensor; export to torch-export instead")
        names[argument], weights[target] = target, tensor.detach().clone().contiguous()
    (given,) = inputs
    code = program.graph.python_code("self")
    source = code.src.replace("device(type='cpu')", "place")  # of the inputs
    unknown = {name for name in code.globals if name not in KNOWN and re.search(rf"\b{name}\b", source)}
    if unknown or "device(" in source:
        what = ", ".join(sorted(unknown)) or "another device"
        raise UserError(f"standalone: the model uses {what}; export to torch-export instead")
    folder.mkdir()
    text = TEMPLATE.format(
        title=_title(facts),
        inputs=given,
        outputs="outputs",
        names="\n".join(f'    "{argument}": "{name}",' for argument, name in names.items()),
        function=_function(source, given),
    )
    (folder / "model.py").write_text(text)
    save_file(weights, folder / "model.safetensors")
    for name, content in facts.items():
        (folder / f"{name}.json").write_text(content)


def _title(facts: Mapping[str, str]) -> str:
    """Word the first line of the file from the record's JSON."""
    return f"A {json.loads(facts['arch'])['family']} compressed from {json.loads(facts['arch'])['source']}."


def _function(source: str, given: str) -> str:
    """Turn a recorded method into a function that returns the only output."""
    head, _, body = source.strip().partition("\n")
    arguments = head[head.index("(") + 1 : head.rindex(")")].replace("self, ", "", 1)
    lines = [line for line in body.splitlines() if line.strip()]
    last = lines[-1].strip()
    assert last.startswith("return (")  # the only output comes as a tuple of one
    assert last.endswith(",)")
    lines[-1] = f"    return {last.removeprefix('return (').removesuffix(',)')}"
    return f"def compute({arguments}):\n    place = {given}.device\n" + "\n".join(lines) + "\n"


def open_standalone(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load a folder that ``write_standalone`` has written, by its own file."""
    spec = importlib.util.spec_from_file_location("standalone_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[torch.Tensor], torch.Tensor] = torch.no_grad()(module.load(folder))
    return found
