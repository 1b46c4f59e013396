"""commands.jsonl in a run directory: requests to the training process, one JSON object per line.

Any process may append to it (`send`); the training process reads new lines between steps, at the cost of one
`stat` if there are none.
"""

import json
import os
from pathlib import Path
from typing import Any

from llm_basics.core import files

COMMANDS = "commands.jsonl"

# maximum number of bytes read between two steps
MAX_BYTES = 65_536


class Inbox:
    """The lines appended to commands.jsonl after the creation of this object."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / COMMANDS
        self.offset = self._size()

    def lines(self) -> list[str]:
        """The complete, non-blank lines since the last call."""
        size = self._size()
        if size == self.offset:
            return []
        # shorter: the file was replaced
        self.offset = self.offset if size > self.offset else 0
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(MAX_BYTES)
        except OSError:
            return []
        complete = content if len(content) == MAX_BYTES and b"\n" not in content else b""
        complete = complete or content[: content.rfind(b"\n") + 1]
        self.offset += len(complete)
        return [line for line in complete.decode("utf-8", "replace").split("\n") if line.strip()]

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0


def send(folder: str | os.PathLike[str], command: dict[str, Any]) -> None:
    """Append a command. Raises WriteError if that fails."""
    with files.open_output(Path(folder) / COMMANDS, "ab") as file:
        # the leading newline ends a torn line of another process
        file.write(f"\n{json.dumps(command)}\n".encode())
