"""Where compiled CPU kernels are cached: beside the source, or where the user may write."""

import os
import stat
import sys
import tempfile
from pathlib import Path

# reasons why kernels could not be cached
uncached: list[str] = []


def find(beside: Path, version: str) -> str:
    """The first writable cache folder for this version, created if missing; "" if there is none.

    The last candidate is a temporary folder, which the user must own: its files are executed.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llm_basics"
    for parent in (beside / "__pycache__", user):
        if parent.is_absolute() and _is_writable(parent / version):
            return str(parent / version)
    try:
        own = Path(tempfile.gettempdir()) / f"llm_basics-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
    except (AttributeError, OSError):  # without user ids, or without a temporary folder
        return ""
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    if not is_own or not _is_writable(own / version):
        return ""
    print(f"warning: {beside} and {user} are not writable; CPU kernels are cached in {own}", file=sys.stderr)
    return str(own / version)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def warn_uncached(reason: str) -> None:
    """Warn once that kernels are not cached, and record the reason."""
    if not uncached:
        print(f"warning: compiled CPU kernels are not cached ({reason})", file=sys.stderr)
    uncached.append(reason)
