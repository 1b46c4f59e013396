"""Types of options: numbers with limits, and `Options`, the base of all dataclasses of options."""

import functools
import math
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Limits of a number: at least `ge`, above `gt`, at most `le`, below `lt`; `most` is a sanity limit."""

    ge: int | float = -math.inf
    gt: int | float = -math.inf
    le: int | float = math.inf
    lt: int | float = math.inf
    most: int | float = math.inf

    def fault(self, value: int | float) -> str:
        """The violated limits, as text; "" if `value` is within them."""
        if self.ge <= value <= self.le and self.gt < value < self.lt:
            return f"at most {self.most:,}" if value > self.most else ""
        low = f"at least {self.ge:,}" if self.ge > -math.inf else f"above {self.gt:,}"
        high = f"at most {self.le:,}" if self.le < math.inf else f"below {self.lt:,}"
        limits = [limit for limit in (low, high) if "inf" not in limit]
        return " and ".join(limits if abs(value) < math.inf or len(limits) == 2 else [*limits, "finite"])


MOST = 10**15  # no text has as many tokens
LIMITS = {int: Range(ge=0, most=MOST), float: Range()}  # default limits by type

Count = Annotated[int, Range(ge=1, most=MOST)]
VocabSize = Annotated[int, Range(ge=1, most=2**31 - 1)]
Length = Annotated[int, Range(ge=0, most=10**6)]
Seed = Annotated[int, Range(ge=0, most=2**32 - 1)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
ProperFraction = Annotated[float, Range(gt=0, lt=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]


def fault(value: Any, hint: Any) -> str:
    """The requirement of the declared type `hint` that `value` violates, as text; "" if it is valid.

    >>> fault(0, Count | None), fault(2.5, int), fault(math.nan, NonNegative), fault(2, Decay)
    ('at least 1', 'int', 'at least 0 and finite', 'at least 0 and below 1')
    """
    limits = None
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        limits = next((note for note in notes if isinstance(note, Range)), None)
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return "" if value is None else fault(value, arguments[0])
    if kind is Literal:
        return "" if value in arguments else " or ".join(arguments)
    if kind is tuple:
        hints = arguments[:1] * len(value) if ... in arguments and isinstance(value, tuple) else arguments
        if not isinstance(value, tuple) or len(value) != len(hints):
            return f"{len(hints)} values"
        return next(filter(None, map(fault, value, hints)), "")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if hint is float else isinstance(value, hint) and (is_number or hint is not int)):
        return hint.__name__
    limits = limits or LIMITS.get(hint)
    return limits.fault(value) if limits else ""


@functools.cache
def declared(cls: type) -> dict[str, Any]:
    """The declared type of each field of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {each.name: hints[each.name] for each in fields(cls)}


class Options:
    """Base of the dataclasses of options; checks the type and limits of every value."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in declared(type(self)).items():  # type: ignore[arg-type]
            if wrong := fault(value := getattr(self, name), hint):
                raise ValueError(f"{self.prefix}{name} must be {wrong}, got {value!r}")
