"""Locks of run directories: one process at a time writes to a run."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from llm_basics.core import files

try:
    import fcntl
except ImportError:  # Windows has no flock: run directories are not locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a run directory; raises ValueError if another process holds it.

    The file `lock` holds the process id and is removed at the end. One that a killed process left behind
    locks nothing.
    """
    path = Path(folder) / "lock"
    with _open_locked(path) as file:
        with files.writing(path):
            file.truncate(0)
            file.write(b"%d\n" % os.getpid())
        try:
            yield
        finally:
            # Windows cannot remove an open file
            with contextlib.suppress(OSError):
                path.unlink()


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        with open(Path(folder) / "lock", "rb") as file:
            if fcntl is None:
                return True
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return False


def _open_locked(path: Path) -> io.FileIO:
    while True:
        with files.writing(path):
            # unbuffered: nothing is left to write where it is closed on a full disk
            file = io.FileIO(path, "a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                file.seek(0)
                owner = file.read().decode().strip()
            raise ValueError(f"{path.parent} is locked by pid {owner}, which is writing to it") from None
        # the process that held the lock may have removed the file since it was opened here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
