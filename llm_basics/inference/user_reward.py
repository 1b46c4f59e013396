"""User-defined reward functions: `my_reward.py:score`, a function of a Python file.

    def score(prompt: str, response: str, expected: str | None) -> float:
        return float(response.strip() == expected)

`expected` is the correct answer, or None if there is none. Higher rewards are better.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_basics import user_code

DEFAULT_NAME = "score"
PARAMETERS = ("prompt", "response", "expected")


@dataclass(frozen=True)
class UserReward:
    """A reward function of a file, whose result is checked at every call.

    `origin` has the file name and a digest of its content, and is recorded with a run.
    """

    function: Callable[[str, str, str | None], Any]
    path: str
    name: str
    origin: str

    def __call__(self, prompt: str, response: str, expected: str | None = None) -> float:
        """The reward of a response. Raises ValueError, with the line, if the function fails."""
        try:
            value = self.function(prompt, response, expected)
        except Exception as error:
            line = user_code.line_in(self.path, error.__traceback__)
            raise ValueError(
                f"{self.path}:{line} failed in {self.name}: {type(error).__name__}: {error} "
                f"(for the response {response!r:.60})"
            ) from error
        # accepts NumPy numbers and tensors of one element, but not text or None
        is_number = hasattr(value, "__float__") and not isinstance(value, str)
        try:
            reward = float(value) if is_number else math.nan
        except (TypeError, ValueError, RuntimeError):
            reward = math.nan
        if not math.isfinite(reward):
            raise ValueError(
                f"{self.name} of {self.path} must return a finite number, got {value!r:.60} (for the "
                f"response {response!r:.60})"
            )
        return reward


def load(reference: str) -> UserReward:
    """Load `my_reward.py:score`; without a name, the function is `score`.

    Raises ValueError if the file fails, or if the function's parameters are not prompt, response, expected.
    """
    path, colon, name = reference.rpartition(":")
    if not colon or name.endswith(".py"):
        path, name = reference, DEFAULT_NAME
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(
            f"a reward must be a function of a Python file, as in my_reward.py:{DEFAULT_NAME}, got "
            f"{reference!r}"
        )
    found = user_code.names(path)
    if name not in found:
        defined = ", ".join(found) or "nothing"
        raise ValueError(f"{path} must define {name} (from {reference}), but it defines {defined}")
    module = user_code.execute(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"{name} of {path} must be a function of ({', '.join(PARAMETERS)}), got {function!r:.60}"
        )
    _check_parameters(function, path, name)
    return UserReward(function, path, name, f"{user_code.file_origin(module)}:{name}")


def _check_parameters(function: Callable[..., Any], path: str, name: str) -> None:
    """Raise ValueError unless three texts can be passed in the order of PARAMETERS."""
    signature = inspect.signature(function)
    names = [each.name for each in signature.parameters.values()][: len(PARAMETERS)]
    try:
        signature.bind(*PARAMETERS)
    except TypeError:
        names = []
    if tuple(names) != PARAMETERS:
        raise ValueError(
            f"{name} of {path} must have the parameters ({', '.join(PARAMETERS)}), got {signature}; "
            "expected is None where a prompt has no right answer"
        )
