"""How many cases a randomized test tries: a fifth of them by default, all with `-m "slow or not slow"`."""

import re

FEWER = 5

is_full = False


def set_from(marker_expression: str) -> None:
    """All cases where the expression of pytest's option -m selects slow tests."""
    global is_full
    is_full = re.search(r"(?<!not )\bslow\b", marker_expression) is not None


def count(n: int) -> int:
    """The cases to try of `n`."""
    return n if is_full else -(-n // FEWER)
