"""What a search logs for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from prunesweep.search.execution.driver import log_point
from prunesweep.search.store.run import Result


def summaries(folder: Path) -> list[bytes]:
    """The summaries of a folder's only file of events."""
    (file,) = folder.iterdir()
    content, found, at = file.read_bytes(), list[bytes](), 0
    while at < len(content):  # length, its checksum, event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        if event.HasField("summary"):
            found.append(event.summary.SerializeToString(deterministic=True) + bytes([event.step]))
        at += size + 16
    return found


def test_a_point_is_logged_as_tensorboardx_does(tmp_path: Path) -> None:
    point = {"budget": 0.5, "skip": 2, "method": "nvit"}
    result = Result(3, 90.0, 90.0, 500, 10, "", point, 1.0, rung=1)
    found = {"hparam/top1": 90.0, "hparam/macs": 500.0}
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_hparams(dict(point), found, name="theirs", global_step=1)
    log_point(tmp_path / "ours", result, found)
    theirs, ours = summaries(tmp_path / "theirs"), summaries(tmp_path / "ours")
    assert len(ours) == 5
    # the first three have a time of their own
    assert [one[-1] for one in ours[3:]] == [1, 1]
    assert ours[3:] == theirs[3:]
    assert [len(one) for one in ours[:3]] == [len(one) for one in theirs[:3]]
