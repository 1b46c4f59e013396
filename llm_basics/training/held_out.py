"""The held-out text of a run: its identity, and a prompt from it."""

import hashlib

import numpy as np

from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import documents

# number of characters of the held-out text that are hashed
DIGEST_CHARACTERS = 2**18


def digest(tokenizer: tokenizers.Tokenizer, tokens: np.ndarray, n_bytes: int) -> str:
    """A hash of a text of `n_bytes`, independent of the tokenizer; for a long text, of its beginning."""
    # a token has at least one byte, a character at most four, so the slice is long enough for any tokenizer
    text = tokenizer.decode(tokens[: 4 * DIGEST_CHARACTERS].tolist())[:DIGEST_CHARACTERS]
    return hashlib.sha256(f"{n_bytes} {text}".encode("utf-8", "replace")).hexdigest()


def opening_line(text: str) -> str:
    """The first line that ends with a colon, a natural prompt in code and in plays; else the first line.

    >>> opening_line("Act I.\\nROMEO:\\nIs the day so young?")
    'ROMEO:'
    """
    lines = [line for line in text.split(documents.DOCUMENT_SEPARATOR)[0].splitlines() if line.strip()]
    return next((line for line in lines if line.endswith(":")), lines[0] if lines else "")
