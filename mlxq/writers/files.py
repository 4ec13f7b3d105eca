"""Writing to disk: errors in one clear line, and file systems that do not support everything."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlxq.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
#: macOS refuses a single write of 2^31 bytes or more; Linux cuts it short.
_MAX_WRITE = 1 << 30


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about an output into one clear line.

    Raises:
        OutputError: instead of any OSError in the block.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise OutputError(f"{path}: the disk is full ({os.strerror(e.errno).lower()}); nothing was left") from e
        if e.errno == errno.EFBIG:
            raise OutputError(
                f"{path}: a file is too large for this file system or for the limit on file sizes (ulimit -f); "
                "nothing was left; choose another disk or raise the limit"
            ) from e
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e


def reserve(fd: int, nbytes: int) -> None:
    """Reserve disk space where the system can, so that a full disk shows before any work."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset` of the file."""
    view = memoryview(data)
    while view.nbytes:
        n = os.pwrite(fd, view[:_MAX_WRITE], offset)
        view, offset = view[n:], offset + n


def sync(path: Path) -> None:
    """Flush a file or directory to the disk. Network file systems that cannot sync a directory are let be."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(fd)


def remove_tree(path: Path) -> bool:
    """Remove a directory and all in it, also what is read-only; returns whether it is gone."""
    shutil.rmtree(path, ignore_errors=True)
    if os.path.isdir(path) and not os.path.islink(path):
        _unlock(path)
        for directory, names, _ in os.walk(path):
            for name in names:
                _unlock(Path(directory, name))
        shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def _unlock(directory: Path) -> None:
    if not directory.is_symlink():
        with contextlib.suppress(OSError):
            directory.chmod(0o700)
