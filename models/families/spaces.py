"""Spaces: the channels that the axes of a tensor count, and the tensor's role there.

A *space* is a set of channels or units that several tensors share, such as the residual channels of a stage. An axis
counts one space, or several side by side: the rows of a joint query, key and value projection count ``q``, ``k`` and
``v``. Tables here use the names of tensors within a block, stage or model, and the local names of axes; a ``Family``
turns them into full names.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ATTENTION",
    "BLOCK",
    "CLASSIFIERS",
    "CONVOLUTION",
    "MLP",
    "NORMS",
    "TOKEN_PLAN",
    "WHOLE",
    "AxisUse",
    "Table",
    "linear",
    "per_channel",
    "reads",
    "scales",
    "shares",
    "writes",
]


class AxisUse(NamedTuple):
    """One axis of a tensor: what it counts, and what the tensor does with that.

    ``role`` is ``writes`` (the tensor's output lies there), ``reads`` (its input does), ``scales`` (one number per
    channel, such as a norm's gain) or ``shares`` (a table that writes in one place and reads in another). An axis that
    is always kept whole has two empty strings.
    """

    axis: str
    role: str


Table = dict[str, tuple[AxisUse, ...]]  # from the first axis on; axes left out are kept whole

WHOLE = AxisUse("", "")


def writes(axis: str) -> AxisUse:
    """Describe an axis that counts channels of a space which the tensor's output lies in."""
    return AxisUse(axis, "writes")


def reads(axis: str) -> AxisUse:
    """Describe an axis that counts channels of a space which the tensor's input lies in."""
    return AxisUse(axis, "reads")


def scales(axis: str) -> AxisUse:
    """Describe an axis with one number per channel of a space, such as a norm's gain."""
    return AxisUse(axis, "scales")


def shares(axis: str) -> AxisUse:
    """Describe an axis of a table that writes a space in one place and reads it in another."""
    return AxisUse(axis, "shares")


def linear(name: str, out: str, into: str) -> Table:
    """Describe the weight and bias of a linear layer or convolution, whether it has a bias or not.

    Args:
        name: of the layer.
        out: space of its output; "" where that is always kept whole.
        into: space of its input; "" where that is always kept whole.
    """
    output, input_ = writes(out) if out else WHOLE, reads(into) if into else WHOLE
    return {f"{name}.weight": (output, input_), f"{name}.bias": (output,)}


def per_channel(name: str, axis: str) -> Table:
    """Describe the weight and bias of a norm or a depthwise convolution, one entry per channel.

    Args:
        name: of the layer.
        axis: space of its channels.
    """
    return {f"{name}.weight": (scales(axis),), f"{name}.bias": (scales(axis),)}


ATTENTION: Table = {  # queries, keys and values in one projection
    **linear("attn.qkv", "qkv", "embed"),
    **linear("attn.proj", "embed", "v"),
    **per_channel("attn.q_norm", "qk_norm"),
    **per_channel("attn.k_norm", "qk_norm"),
    "attn.token_scale": (),
}
CONVOLUTION: Table = {  # models.layers.mixers.ConvMixer: its bottleneck channels are v
    **linear("attn.bconv.0", "v", "embed"),
    **per_channel("attn.bconv.1", "v"),
    "attn.bconv.1.running_mean": (scales("v"),),
    "attn.bconv.1.running_var": (scales("v"),),
    "attn.bconv.1.num_batches_tracked": (),
    **linear("attn.bconv.3", "embed", "v"),
}
MLP: Table = {  # of a gated one, the first layer has two rows for a unit
    **linear("mlp.fc1", "mlp_in", "embed"),
    **per_channel("mlp.entry_norm", "embed"),
    **per_channel("mlp.norm", "mlp"),
    **linear("mlp.fc2", "embed", "mlp"),
}
NORMS: Table = {**per_channel("norm1", "embed"), **per_channel("norm2", "embed")}
TOKEN_PLAN: Table = {f"token_merge.{part}": () for part in ("assign", "weight", "matrix", "recover", "takes_part")}
BLOCK: Table = {
    **NORMS,
    **ATTENTION,
    **CONVOLUTION,
    **MLP,
    "ls1.gamma": (scales("embed"),),
    "ls2.gamma": (scales("embed"),),
    **TOKEN_PLAN,
}
CLASSIFIERS: Table = {**linear("head", "", "out"), **linear("head.fc", "", "out"), **linear("head_dist", "", "out")}
