"""The pieces that were read ahead to learn a tokenizer, in a file until they are encoded."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from llm_basics.core import files
from llm_basics.data import shard_builder


def write(pieces: Iterator[shard_builder.Piece], n_bytes: int, path: Path) -> Iterator[str]:
    """The training texts of the next pieces, up to `n_bytes`; the pieces go to a file for `read`."""
    with files.open_output(path) as file:
        for piece in pieces:
            file.write((json.dumps(dataclasses.asdict(piece)) + "\n").encode())
            if not piece.held_out:
                yield piece.text
                n_bytes -= len(piece.text.encode("utf-8"))
                if n_bytes <= 0:
                    return


def read(path: Path) -> Iterator[shard_builder.Piece]:
    """The pieces that `write` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            position = shard_builder.SourcePosition(**fields["position"])
            yield shard_builder.Piece(**fields | {"position": position})
