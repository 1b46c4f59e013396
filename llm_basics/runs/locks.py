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

    The file `lock` contains the process id and is removed at the end. The system releases the lock of a
    killed process.
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


def owner(folder: str | os.PathLike[str]) -> int | None:
    """The id of the process that writes to a run directory; None if there is none."""
    try:
        with open(Path(folder) / "lock", "rb") as file:
            pid = int(file.read(32) or 0)
            if fcntl is None:
                return pid or None
            # only if the process exists: this lock could collide with that of a starting run
            if pid < 1 or not _is_alive(pid):
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return pid
    except (OSError, ValueError):
        return None


def _open_locked(path: Path) -> io.FileIO:
    while True:
        with files.writing(path):
            # unbuffered: closing the file on a full disk must not write
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
        # the previous owner of the lock may have removed the file since it was opened
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
