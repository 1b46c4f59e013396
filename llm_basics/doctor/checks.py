"""The result of one check of the machine."""

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """The level, the finding and the advice of a check.

    >>> print(Check("disk", WARNING, "3 MB/s", "write runs to a local disk"))
    warning  disk         3 MB/s; write runs to a local disk
    """

    name: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {self.name:12} {self.found}" + (f"; {self.advice}" if self.advice else "")


def check(name: str, found: str, advice: str, is_bad: bool, level: str = WARNING) -> Check:
    """A check that is ok, or of `level` with the advice if `is_bad`."""
    return Check(name, level, found, advice) if is_bad else Check(name, OK, found)
