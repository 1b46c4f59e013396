"""Read text and JSON with the location of every error, and write files atomically.

Errors name the file and line, `a.jsonl:3`. File formats are not here: each has its own module.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def decode(
    content: bytes, name: object, on_bad_utf8: str | None = None, line: int = 1, offset: int = 0
) -> str:
    """Decode bytes that start in `line` and at `offset` of a file. Raises ValueError if they are not UTF-8.

    `on_bad_utf8` is `replace`, `error`, or None if the caller has no such option.
    """
    try:
        return content.decode("utf-8", errors="replace" if on_bad_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        number, byte = line + content.count(b"\n", 0, error.start), content[error.start]
        advice = ", or replace such bytes with --on_bad_utf8 replace" if on_bad_utf8 else ""
        raise ValueError(
            f"{name}:{number} must be UTF-8, got byte 0x{byte:02x} at offset {offset + error.start}; "
            f"fix the file{advice}"
        ) from None


def parse_json(text: str, name: object, line: int = 1) -> Any:
    """Parse JSON that starts in `line` of a file. Raises ValueError if it is invalid."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        location = f"{name}:{line + error.lineno - 1}"
        raise ValueError(f"{location} must be JSON; {error.msg} in column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}:{line} must be JSON; {error}") from None


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError if it is not UTF-8."""
    return decode(path.read_bytes(), path)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ValueError if it is invalid."""
    return parse_json(read_text(path), path)


# --------------------------------------------------------------------------------------------------
# Writing

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WriteError(OSError):
    """A failed write; the message has the file, the reason, and the bytes needed and free."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], n_bytes: int = 0, n_done: int = 0) -> Iterator[None]:
    """Raise OSErrors as WriteErrors of `path`, which needs `n_bytes` or more and has `n_done` so far."""
    try:
        yield
    except (WriteError, BrokenPipeError):
        raise
    except OSError as error:
        shown = re.sub(r"\.tmp-\d+", "", str(path))
        message = f"{shown} could not be written ({error.strerror or error})"
        if error.errno in FULL and n_bytes:
            free = free_bytes(Path(path)) + n_done
            message += f"; it needs at least {n_bytes:,} bytes, {free:,} are free"
        raise WriteError(error.errno, message) from None


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(p for p in (path, *path.resolve().parents) if p.is_dir())).free


class _Output(io.FileIO):
    """A file to write, whose errors are WriteErrors."""

    def __init__(self, path: str | os.PathLike[str], mode: str) -> None:
        with writing(path):
            super().__init__(path, mode)
        self.start = os.fstat(self.fileno()).st_size

    def write(self, content: Any) -> int:
        n_done = os.fstat(self.fileno()).st_size - self.start
        with writing(str(self.name), n_done + len(content), n_done):
            return super().write(content)


def open_output(path: str | os.PathLike[str], mode: str = "wb") -> BinaryIO:
    """Open a log or a temporary file; all other files are written by `replacing`."""
    return io.BufferedWriter(_Output(path, mode))


def create_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its parents unless it exists."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def temporary(path: Path) -> Path:
    """The path of the temporary file that becomes `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file that replaces `path` on success; after an error `path` is unchanged.

    If the process or the machine stops, `path` has either the old or the new content. Permissions and links
    are preserved, and devices and pipes are written directly.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open_output(path) as file:
            yield file
        return
    target = Path(os.path.realpath(path) if os.path.islink(path) else path)
    partial = temporary(target)
    with writing(path):
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        with open_output(partial) as file:
            yield file
            file.flush()
            with writing(path):
                os.fsync(file.fileno())
        with writing(path):
            if target.exists():
                shutil.copymode(target, partial)
            os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    # sync the directory entry as well, which some network file systems do not support
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file atomically (`replacing`); text as UTF-8, with its line ends unchanged."""
    write_all({Path(path): content})


def write_all(contents: Mapping[Path, str | bytes]) -> None:
    """`write` several files: all new contents are on the disk before the first file is replaced."""
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
