"""Output of a program before its options are parsed, without importing the parser."""

import difflib
from collections.abc import Sequence


def show(text: str) -> None:
    """Print the result of a program; an error ends it as `parse.exit_on_error` does."""
    try:
        print(text, flush=True)
    except OSError as error:
        from llm_basics.cli import parse  # slow

        with parse.exit_on_error():
            raise error


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """The error message for an unknown name, with the closest known one, or all of them.

    >>> unknown_name("step", "softmx", ["linear", "softmax"])
    'unknown step softmx; did you mean softmax?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name}; " + (
        f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
    )
