"""Read what was logged for TensorBoard, without TensorBoard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

__all__ = ["scalars"]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a scalar, in the order in which TensorBoard reads a run's files."""
    events = (event for path in sorted(folder.glob("events*")) for event in _events(path))
    return [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == tag]


def _events(path: Path) -> Iterator[Event]:
    data, place = path.read_bytes(), 0
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + size])
        place += 16 + size
