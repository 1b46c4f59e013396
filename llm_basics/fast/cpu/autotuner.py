"""The fastest number of threads for decoding, with drafts or without, measured during generation."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm_basics.core import files
from llm_basics.fast import kernel_cache
from llm_basics.fast.cpu import decode

# greedy tokens per kernel call: about this many seconds, and at most so many tokens
SECONDS_PER_CALL, MAX_TOKENS_PER_CALL = 0.02, 128

# calls between two trials of slower configs
CALLS_PER_TRIAL = 32


class DecodingConfig(NamedTuple):
    """The number of threads, and whether int8 weights draft tokens."""

    n_threads: int
    has_drafts: bool = False


class Autotuner:
    """Selects the fastest of several configs by timing them during generation.

    Threads lose where another program uses a core, drafts where the weights fit a cache or drafts are often
    rejected. Slower configs are tried again, at growing intervals. With `path`, timings are kept in a file.
    """

    def __init__(self, configs: Sequence[DecodingConfig], path: Path | None = None) -> None:
        # seconds per token, the config not tried for longest first; 0: not measured
        self.seconds = dict.fromkeys(configs, 0.0)
        self.calls, self.path = 0, path
        # a missing or damaged file has no timings
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads(path.read_text()) if path else {}
            self.seconds = {each: max(0.0, float(stored.get(str(each), 0))) for each in configs}
        self.saved = self.fastest

    @property
    def fastest(self) -> DecodingConfig:
        """The config with the lowest time per token; one without a measurement first."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def is_trial(self) -> bool:
        """Whether the next call tries a slower config."""
        call = self.calls + 1
        is_due = call % CALLS_PER_TRIAL == 0 or call.bit_count() == 1
        return is_due and call > len(self.seconds)

    def tokens_per_call(self) -> int:
        """The number of tokens of the next call, a multiple of a full draft."""
        draft, seconds = decode.MOST_DRAFTED + 1, min(self.seconds.values())
        if self.is_trial() or not seconds:
            return 2 * draft
        return draft * max(1, min(int(SECONDS_PER_CALL / seconds), MAX_TOKENS_PER_CALL) // draft)

    def next_config(self) -> DecodingConfig:
        """The config of the next call."""
        is_trial, fastest = self.is_trial(), self.fastest
        self.calls += 1
        return next((each for each in self.seconds if each != fastest), fastest) if is_trial else fastest

    def record(self, used: DecodingConfig, seconds: float) -> None:
        """Record the seconds per token of a call; a slower one, perhaps by chance, counts a quarter."""
        before = self.seconds.pop(used) or seconds
        self.seconds[used] = min(seconds, before + (seconds - before) / 4)

    def save(self) -> None:
        """Write the timings to the file if another config is the fastest now, and all were measured."""
        if self.path and self.fastest != self.saved and all(self.seconds.values()):
            self.saved = self.fastest
            # a cache only: without it, the next process measures again
            with contextlib.suppress(OSError):
                files.write(self.path, json.dumps({str(each): s for each, s in self.seconds.items()}))


@functools.cache
def for_model(configs: tuple[DecodingConfig, ...], n_parameters: int) -> Autotuner:
    """The autotuner of models of this size, with the timings of earlier processes on this machine."""
    name = f"decoding-{n_parameters}-{configs[0].n_threads}-{len(configs)}.json"
    return Autotuner(configs, Path(kernel_cache.folder(), name) if kernel_cache.folder() else None)
