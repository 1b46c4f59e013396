"""A temporary file of the pieces that were read to train a tokenizer, until they are encoded."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from llm_basics.core import files
from llm_basics.data import shard_builder


def write(pieces: Iterator[shard_builder.Piece], n_bytes: int, path: Path) -> Iterator[str]:
    """Yield the training texts of the next pieces, up to `n_bytes`; write the pieces to a file for `read`."""
    with files.open_output(path) as file:
        for piece in pieces:
            file.write((json.dumps(dataclasses.asdict(piece)) + "\n").encode())
            if not piece.held_out:
                yield piece.text
                n_bytes -= len(piece.text.encode("utf-8"))
                if n_bytes <= 0:
                    return


def read(path: Path) -> Iterator[shard_builder.Piece]:
    """The pieces in a file written by `write`."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            position = shard_builder.SourcePosition(**fields["position"])
            yield shard_builder.Piece(**fields | {"position": position})
