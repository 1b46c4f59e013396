"""The held-out text of a run: its identity, and a prompt from it."""

import hashlib

import numpy as np

from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import documents

# characters of the held-out text that its hash depends on
DIGEST_CHARACTERS = 2**18


def digest(tokenizer: tokenizers.Tokenizer, tokens: np.ndarray, n_bytes: int) -> str:
    """A hash of a text of `n_bytes`, whatever its tokenizer; of a long text, the beginning is hashed."""
    # a token has at least a byte, a character at most four: all tokenizers reach this many characters
    text = tokenizer.decode(tokens[: 4 * DIGEST_CHARACTERS].tolist())[:DIGEST_CHARACTERS]
    return hashlib.sha256(f"{n_bytes} {text}".encode("utf-8", "replace")).hexdigest()


def opening_line(text: str) -> str:
    """The first line that ends with a colon, a natural prompt in code and in plays; else the first line.

    >>> opening_line("Act I.\\nROMEO:\\nIs the day so young?")
    'ROMEO:'
    """
    lines = [line for line in text.split(documents.DOCUMENT_SEPARATOR)[0].splitlines() if line.strip()]
    return next((line for line in lines if line.endswith(":")), lines[0] if lines else "")
