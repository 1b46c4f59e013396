"""The seam: whose pieces are in use, the reference or its fast twins.

Every call goes through a module's attribute, so to replace a piece is to set that attribute. A twin has the
name and the signature of its reference, and the same results.

    >>> with using("fast", say=lambda line: None):
    ...     origins()["bpe.train_bpe"]
    'llm_basics.fast.bpe'
    >>> origins()["bpe.train_bpe"]
    'llm_basics.bpe'
"""

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator

from llm_basics import bpe, tokenizer

# where the twins of a module are
TWINS = {bpe: "llm_basics.fast.bpe", tokenizer: "llm_basics.fast.tokenizer"}


def use(what: str, say: Callable[[str], None] = print) -> None:
    """Put the fast twins in the place of the reference pieces, until the program ends."""
    if what != "fast":
        raise ValueError(f"what to use must be fast, got {what!r}")
    machine = importlib.import_module("llm_basics.fast.machine")
    if not machine.used_before():
        say("compiling the fast tokenizer, which takes about 10 s and is done once (--fast off does without)")
    for module, name, twin in _twins():
        # a piece that somebody else has put there wins
        if getattr(module, name).__module__ == module.__name__:
            setattr(module, name, twin)


@contextlib.contextmanager
def using(what: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """`use` for the length of a block."""
    before = [(module, name, getattr(module, name)) for module, name, _ in _twins()]
    use(what, say)
    try:
        yield
    finally:
        for module, name, piece in before:
            setattr(module, name, piece)


def origins() -> dict[str, str]:
    """For each piece that has a twin, the module whose version is in use."""
    return {
        f"{module.__name__.removeprefix('llm_basics.')}.{name}": getattr(module, name).__module__
        for module, name, _ in _twins()
    }


def _twins() -> Iterator[tuple[types.ModuleType, str, object]]:
    """The module, name and twin of each piece that has one."""
    for module, path in TWINS.items():
        twins = importlib.import_module(path)
        for name, twin in sorted(vars(twins).items()):
            if (
                getattr(twin, "__module__", None) == path
                and not name.startswith("_")
                and hasattr(module, name)
            ):
                yield module, name, twin
