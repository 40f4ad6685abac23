"""Publishing files: whole or absent whenever the process is killed or the power fails, and readable to whom others are.

What is read later is written beside its place, and moved there once it is on the disk: every file, then every folder,
then the rename, then the folder that it is renamed in. Logs that are appended to (``metrics.jsonl``, TensorBoard's) are
not; the study's journal does so itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from prunesweep.models.errors import UserError

__all__ = [
    "check_place",
    "disk_full",
    "machine_fails",
    "make_folder",
    "publish",
    "publish_file",
    "publish_folder",
    "scratch_beside",
    "sweep",
    "sweep_below",
    "sync",
    "write_refused",
    "write_text",
]

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems that cannot sync a folder


def _scratch(path: Path) -> Path:
    """Name a scratch path that no other process uses.

    The host's name and the namespace of process ids are part of it: containers may well have the same process ids.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{_namespace()}.{os.getpid()}.tmp")


def _namespace() -> str:
    """Return the number of this process's namespace of process ids; 0 where the system has none."""
    with contextlib.suppress(OSError):
        return "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    return "0"


def sweep(path: Path, *, held: bool = False) -> None:
    """Remove what processes on this host that were killed have left beside a file or folder that they were making.

    Args:
        path: what they were making.
        held: this process alone may make it now, so all that others on this host have left goes; by default only what
            is known to be of a process that has ended.
    """
    left = re.compile(re.escape(f".{path.name}.{socket.gethostname()}.") + r"(?:(\d+)\.)?(\d+)\.(tmp|old)(\.rights)?")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(path.parent):
            if (found := left.fullmatch(name)) and (held or (found[1] == _namespace() and _ended(int(found[2])))):
                one = path.with_name(name)
                if one.is_dir():
                    shutil.rmtree(one, ignore_errors=True)
                else:
                    one.unlink(missing_ok=True)


def sweep_below(folder: Path) -> None:
    """Remove what processes on this host that were killed have left of any file or folder below a folder."""
    left = re.compile(r"\.(.+)\." + re.escape(socket.gethostname()) + r"\.\d+\.\d+\.(?:tmp|old)")
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if found := left.fullmatch(name):
                sweep(Path(place, found[1]))


def _ended(pid: int) -> bool:
    """Whether a process of this process's namespace has ended; only Linux tells."""
    return Path("/proc/self/ns/pid").is_symlink() and not Path(f"/proc/{pid}").exists()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part.

    Args:
        path: the file; one that exists is replaced.
        text: the new content, written in UTF-8.
    """
    with publish_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def make_folder(path: Path, *, within: Path | None = None) -> None:
    """Make a folder that may be there, and its missing parents, so that they are there after a power failure too.

    Args:
        path: the folder.
        within: one of its parents, which must be there: that of storage that is gone is not made anew elsewhere.

    Raises:
        FileNotFoundError: ``within`` is not there.
    """
    if within is not None and not within.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(within))
    for folder in reversed([one for one in (path, *path.parents) if not one.is_dir()]):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``, and publish the file there as ``path`` once the block ends well.

    A file that exists is replaced. If the block fails, ``path`` is left as it was and the scratch file is removed. What
    a killed process has left of the same file goes, too.
    """
    scratch = _scratch(path)
    sweep(path)
    try:
        yield scratch
        publish(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a scratch folder beside ``path``, and publish it as ``path`` once the block ends well.

    If the block fails, ``path`` is left as it was and the scratch folder is removed. What a killed process has left of
    the same folder goes, too.

    Args:
        path: the folder; missing parents are made.
        replace: replace a folder that exists.

    Raises:
        FileExistsError: there is a folder with something in it, and it is not to be replaced.
    """
    make_folder(path.parent)
    with scratch_beside(path) as scratch:
        yield scratch
        publish(scratch, path, replace=replace)


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, whose parent is there; it goes at the end of the block, if it is there still.

    What a killed process has left of its own goes at the beginning.
    """
    scratch = _scratch(path)
    sweep(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, path: Path, *, replace: bool = True) -> None:
    """Move a file or a folder to its place once all of it is on the disk, with the rights that new files get there.

    Rights follow the umask, whatever wrote the files: some libraries write them for their owner alone.

    Args:
        scratch: the file or folder, on the file system of ``path``.
        path: its place, in a folder that is there.
        replace: replace a folder that exists.

    Raises:
        FileExistsError: ``path`` has something in it, and it is not to be replaced.
    """
    _settle(scratch)
    if not replace:
        try:
            os.rename(scratch, path)  # in one step, whoever else is making the folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    elif path.is_dir():
        old = _scratch(path).with_suffix(".old")
        os.replace(path, old)
        os.replace(scratch, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, path)
    sync(path.parent)


def _settle(path: Path) -> None:
    """Give a file, or a folder and all in it, the rights of new ones, and wait until they are on the disk."""
    probe = path.with_name(f"{path.name}.rights")  # a process's umask cannot be read without being changed
    probe.mkdir()
    rights = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _settle_one(Path(folder, name), rights & 0o666)
        _settle_one(Path(folder), rights)
    if not path.is_dir():
        _settle_one(path, rights & 0o666)


def _settle_one(path: Path, rights: int) -> None:
    if path.is_symlink():
        return
    if stat.S_IMODE(path.stat().st_mode) != rights:
        with contextlib.suppress(PermissionError):  # a link to a file of someone else's
            path.chmod(rights)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_place(path: Path, option: str = "--out", *, folder: bool = False) -> None:
    """Check that a file can be made, before the work is done whose result it is to hold.

    Args:
        path: the file; parents that are missing are taken for such as will be made.
        option: its name on the command line.
        folder: ``path`` is a folder, which may be there, and files are to be made in it.

    Raises:
        UserError: it is a folder, or none where it should be one, or nothing can be written there.
    """
    if not folder and path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: is a file; give a folder")
    places = (path.absolute(), *path.absolute().parents)[0 if folder else 1 :]
    place = next(parent for parent in places if parent.exists())
    probe = _scratch(place / path.name)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: nothing can be written there: {error.strerror}") from error


def write_refused(error: BaseException) -> str:
    """Say what to do about an error by which nothing can be written to a place; return nothing for other errors."""
    if disk_full(error):
        return "make room"
    for code in (errno.EROFS, errno.EACCES, errno.EPERM):
        said = isinstance(error, SafetensorError) and os.strerror(code) in str(error)
        if said or (isinstance(error, OSError) and error.errno == code):
            return "take a place that you may write to, or have its rights changed"
    return ""


def machine_fails(error: BaseException) -> bool:
    """Whether an error is the machine's, whatever is being done on it: too many open files, storage that fails."""
    codes = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.EROFS)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(os.strerror(code) in str(error) for code in codes[:2])  # libraries in other languages


def disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the quota is full.

    Libraries in other languages put this into the message only, so the message is searched too.
    """
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(os.strerror(code) in str(error) for code in codes)
