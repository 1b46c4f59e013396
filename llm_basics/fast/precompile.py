"""Compile groups of CPU kernels into the cache: `python -m llm_basics.fast.precompile GROUP ...`.

Each group is compiled by calling its functions on a minimal input that reaches all kernels.
"""

import os
import sys
import tempfile
from pathlib import Path

from llm_basics.fast import cache_folder, kernel_cache

TEXT = "The 12 cats' paws, 3 dogs and l'\u00e9t\u00e9;\n\n  it's low, lower, lowest.\n<|end|>"

# lower priority than the main process, which generates with the reference implementation meanwhile
NICENESS = 10


def tokenizer() -> None:
    """Compile the kernels for encoding text."""
    from llm_basics.core import bpe
    from llm_basics.fast import tokenizer
    from llm_basics.fast.text import chunks, scanner

    for pattern in (bpe.SPLIT_PATTERN, bpe.CL100K_PATTERN):
        vocab = {byte: bytes([byte]) for byte in range(256)} | {256: b"lo", 257: b"low"}
        merges = [(b"l", b"o"), (b"lo", b"w")]
        tokenizer.Tokenizer(vocab, merges, ["<|end|>"], pattern).encode(20 * TEXT)
    chunks.last_boundary(scanner.padded(TEXT.encode()), 9, 20, scanner.classes())


def vocabulary() -> None:
    """Compile the kernels for counting pre-tokens and BPE merging."""
    from llm_basics.fast import bpe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(20 * TEXT, encoding="utf-8")
        bpe.train_bpe(path, 300, ["<|end|>"], 2)


def training() -> None:
    """Compile the kernels for training steps."""
    from llm_basics.fast.cpu import trainer

    trainer.compile_kernels()


def decoding() -> None:
    """Compile the kernels for text generation."""
    from llm_basics.fast import generate

    if hasattr(os, "nice"):
        os.nice(NICENESS)
    generate.compile_kernels()


GROUPS = {function.__name__: function for function in (tokenizer, vocabulary, training, decoding)}


def main(groups: list[str]) -> None:
    """Compile the groups that are not yet in the cache."""
    for group in groups:
        with kernel_cache.locked(group):
            if not kernel_cache.is_compiled(group):
                GROUPS[group]()
                if not cache_folder.uncached:
                    kernel_cache.marker(group).touch()


if __name__ == "__main__":
    main(sys.argv[1:])
