"""Text generation: machine code on a CPU (`decoding`), a CUDA graph on a GPU (`static`)."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.core import config
from llm_basics.core import functional as F
from llm_basics.core import generate as core_generate
from llm_basics.core import model as models
from llm_basics.fast import kernel_cache, numba_jit
from llm_basics.fast.cpu import decode, threads, vectors, weights
from llm_basics.fast.cuda import cuda_graph
from llm_basics.systems import quantization

# what is written before the first of it is given out: seconds, and tokens at most
SECONDS_AT_ONCE, MOST_AT_ONCE = 0.02, 128

# tokens of a prompt that the loops read faster than torch, which takes a millisecond for any
SHORT_PROMPT = 48

# whether tokens are drafted with weights of 8 bits: of several choices the faster, measured while writing
DRAFTS: tuple[bool, ...] = (True, False)

# threads that read a token together at most, and how often it is tried at least whether as many pay
MOST_THREADS, CALLS_TO_A_TRIAL = 8, 32
ONE_TEAM = Lock()

# the reference, whose names may come to stand for what is defined here
generate_with_model = core_generate.generate
probabilities_by_sorting = core_generate.next_token_probabilities


@functools.cache
def say_once(line: str) -> None:
    """Say what is true of every text, beside the text."""
    print(line, file=sys.stderr)


class LoopConfig(NamedTuple):
    """How to read or write tokens: on so many threads, with drafts or without."""

    size: int
    has_drafts: bool = False


class Autotuner:
    """Which of several ways is the fastest, measured while texts are written.

    Threads lose where another program uses a core, drafts where weights are in the cache or drafts are often
    wrong. So slower ways are tried again, more seldom with time.
    """

    def __init__(self, ways: Iterable[LoopConfig]) -> None:
        # what a token took, those first that were not tried for long
        self.seconds = dict.fromkeys(ways, 0.0)
        self.calls = 0

    def is_trial(self) -> bool:
        """Whether the next call is to see if what was slower still is."""
        call = self.calls + 1
        is_time = call % CALLS_TO_A_TRIAL == 0 or call.bit_count() == 1
        return is_time and call > len(self.seconds)

    def tokens_at_once(self) -> int:
        """How many tokens to write in the next call, whole drafts of them."""
        draft, seconds = decode.MOST_DRAFTED + 1, min(self.seconds.values())
        if self.is_trial() or not seconds:
            return 2 * draft
        return draft * max(1, min(int(SECONDS_AT_ONCE / seconds), MOST_AT_ONCE) // draft)

    def way(self) -> LoopConfig:
        """How to go on now."""
        is_trial = self.is_trial()
        self.calls += 1
        fastest = min(self.seconds, key=lambda way: self.seconds[way])
        return next((way for way in self.seconds if way != fastest), fastest) if is_trial else fastest

    def note(self, way: LoopConfig, seconds: float) -> None:
        """Remember what a token took. What is slower than before may be so by chance."""
        before = self.seconds.pop(way) or seconds
        self.seconds[way] = min(seconds, before + (seconds - before) / 4)


# of as many parameters
known_pace = functools.cache(lambda ways, n_parameters: Autotuner(ways))


class Team:
    """Runs loops on several threads. The result is the same as on one."""

    def __init__(self) -> None:
        self.meeting = np.zeros(2, np.int64)

    def run(self, size: int, work: Callable[[int, decode.Member], int]) -> int:
        """What `work`, given a member and its number, returns: how many tokens it read."""
        members = [decode.Member(number, size, self.meeting) for number in range(size)]
        # two teams that each had some of the helpers would wait for the others for ever
        with ONE_TEAM if size > 1 else contextlib.nullcontext():
            try:
                others = [threads.helpers(MOST_THREADS - 1).submit(work, m.number, m) for m in members[1:]]
                n_tokens = work(0, members[0])
            except BaseException:
                # Ctrl-C, perhaps before this thread was there: the others are not to wait for it
                self.meeting[1] = 1
                raise
            for other in others:
                other.result()
        return n_tokens


class Loops:
    """Reads a text token by token, in machine code. To be made anew when the model was trained."""

    def __init__(self, model: models.TransformerLM) -> None:
        self.model = model
        self.shape, self.weights = weights.shape_of(model), weights.weights_of(model)
        # the loops know addresses only: what is there stays, whatever becomes of the model
        self.held = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.caches = model.make_kv_caches(batch=1)
        keys = torch.stack([cache.keys[0] for cache in self.caches])
        values = torch.stack([cache.values[0] for cache in self.caches])
        # what the model stores for the prompt, the loops find in their place
        for block, cache in enumerate(self.caches):
            cache.keys, cache.values = keys[block, None], values[block, None]
        # if threads parted among them what is summed in one go, the last bits would tell
        is_even = keys.shape[-1] % vectors.ROWS == 0
        most = min(MOST_THREADS, self.shape.n_kv_heads) if threads.CAN_MEET and is_even else 1
        size = min(torch.get_num_threads(), most)
        n_parameters = sum(held.numel() for held in self.held)
        self.reading = known_pace((LoopConfig(size), LoopConfig(1)), n_parameters)
        # int8 rows are multiplied by one token at a time, and drafts have no faster weights
        self.is_int8 = any(isinstance(m, quantization.QuantizedLinear) for m in model.modules())
        drafts = (False,) if self.is_int8 else DRAFTS
        ways = tuple(LoopConfig(n, has_drafts) for n in (size, 1) for has_drafts in drafts)
        self.writing = known_pace(ways, n_parameters)
        self.team, self.has_begun = Team(), False
        self.states = weights.states_for(self.weights, keys.numpy(), values.numpy(), size)
        self.logits = torch.from_numpy(self.states[0].logits[0])
        self.n_drafted = decode.MOST_DRAFTED
        if not numba_jit.used_before("decode"):
            say_once("compiling CPU decoding kernels (about 10 s, cached; disable with --fast off)")

    @torch.no_grad()
    def read_prompt(self, tokens: Int[Tensor, " seq"]) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows a whole prompt."""
        if len(tokens) > SHORT_PROMPT:
            return self.model(tokens[None], caches=self.caches)[0, -1]
        at_a_time = 1 if self.is_int8 else decode.AT_A_TIME
        for position in range(0, len(tokens), at_a_time):
            self._read(tokens[position : position + at_a_time].numpy(), position)
        return self.model.postprocess_logits(self.logits)

    def read_token(self, token: int, position: int) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows `token`, in memory that the next call writes to again."""
        self._read(np.array([token]), position)
        return self.model.postprocess_logits(self.logits)

    def _read(self, tokens: np.ndarray, position: int) -> None:
        """Read tokens from `position` on; `self.logits` are the scores of the one that follows them."""
        # machine code does not look where it writes
        assert 0 < len(tokens) <= decode.AT_A_TIME, tokens
        assert 0 <= position <= self.model.config.context_length - len(tokens), position
        assert 0 <= tokens.min() <= tokens.max() < len(self.weights.token_embeddings), tokens

        def work(number: int, member: decode.Member) -> int:
            room = self.states[number], member
            decode.read_tokens(tokens, position, False, self.shape, self.weights, *room)
            return len(tokens)

        way = self.reading.way()
        if len(tokens) == 1:
            self._timed(self.reading, way, work)
        else:
            self.team.run(way.size, work)

    def _timed(self, pace: Autotuner, way: LoopConfig, work: Callable[[int, decode.Member], int]) -> int:
        """What `work` returns; `pace` is told how long each of as many tokens took."""
        began = time.perf_counter()
        n_tokens = self.team.run(way.size, work)
        if self.has_begun:  # before, the threads that read the prompt may still be looking for more work
            pace.note(way, (time.perf_counter() - began) / max(n_tokens, 1))
        self.has_begun = True
        return n_tokens

    @functools.cached_property
    def rounded(self) -> tuple[decode.Weights, list[np.ndarray]]:
        """The weights of the draft, and their numbers, which are kept here."""
        return weights.rounded(self.weights)

    def likeliest_after(self, token: int, position: int, n: int) -> list[int]:
        """Up to `n` tokens that follow `token`, each the likeliest, as many as take a moment; fewer where
        rounding decides."""
        assert 0 <= position <= self.model.config.context_length - n, (position, n)
        assert 0 <= token < len(self.weights.token_embeddings), token
        n = min(n, self.writing.tokens_at_once())
        way = self.writing.way()
        drafting = self.rounded[0] if way.has_drafts else self.weights
        found = np.empty((len(self.states), n), np.int64)
        n_next = np.full((len(self.states), 1), self.n_drafted if way.has_drafts else decode.NEVER)

        def work(number: int, member: decode.Member) -> int:
            room = self.states[number], member, n_next[number], found[number]
            return decode.write_likeliest(token, position, self.shape, self.weights, drafting, *room)

        n_found = self._timed(self.writing, way, work)
        if way.has_drafts:
            self.n_drafted = n_next[0, 0]
        return found[0, :n_found].tolist()


def next_token_probabilities(
    logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "... vocab"]:
    """`generate.next_token_probabilities`: the same numbers, from a search for the k likeliest.

    All that is summed is summed in the order in which the reference sums it, so that no bit is different.
    """
    kept = 1 if temperature == 0 else top_k
    size = logits.shape[-1]
    if kept is None or not 1 <= kept < size or not temperature >= 0 or not (top_p is None or 0 < top_p <= 1):
        return probabilities_by_sorting(logits, temperature, top_k, top_p)
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    probabilities = F.softmax(shifted / (temperature or 1.0))
    likeliest, ids = probabilities.topk(kept + 1)
    if (likeliest[..., -2] == likeliest[..., -1]).any():
        # of equals the lowest ids go first, which the search does not care about
        return probabilities_by_sorting(logits, temperature, top_k, top_p)
    ids = ids[..., :kept].sort().values
    likeliest, order = probabilities.gather(-1, ids).sort(descending=True, stable=True)
    ids = ids.gather(-1, order)
    in_order = torch.nn.functional.pad(likeliest, (0, size - kept))
    if top_p is not None:
        total = in_order.sum(-1, keepdim=True)
        before = in_order.cumsum(-1) - in_order
        in_order[before >= top_p * total] = 0
    in_order /= in_order.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, ids, in_order[..., :kept])


@torch.no_grad()
def generate(
    model: models.TransformerLM,
    prompt: Int[Tensor, " seq"],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
    adjust: core_generate.LogitsFunction | None = None,
) -> Iterator[int]:
    """`generate.generate` with CPU kernels or a CUDA graph: the same tokens.

    Models with unknown parts use the reference. At temperature 0 only the first token is from `generator`.
    """
    if reason := weights.supports(model):
        say_once(f"text is generated by the reference, since {reason}")
    # the reference takes less time than waiting for kernels that are being compiled
    if reason or (not prompt.is_cuda and kernel_cache.is_pending("decoding")):
        settings = (temperature, top_k, top_p, stop_id, generator, adjust)
        yield from generate_with_model(model, prompt, max_new_tokens, *settings)
        return
    if prompt.numel() == 0:
        raise ValueError("the prompt must have at least one token, got none")
    was_training, context_length, text = model.training, model.config.context_length, prompt.tolist()
    model.eval()
    reader = cuda_graph.StaticStep(model) if prompt.is_cuda else Loops(model)
    try:
        while (n_new := len(text) - prompt.numel()) < max_new_tokens:
            certain: list[int] = []
            room = context_length + 1 - len(text)
            if temperature == 0 and adjust is None and n_new and room > 0:
                n = min(max_new_tokens - n_new, room)
                certain = reader.likeliest_after(text[-1], len(text) - 1, n)
            for token in certain:
                if token == stop_id:
                    return
                text.append(token)
                yield token
            if certain:
                continue
            if len(text) > context_length:
                logits = model(torch.tensor([text[-context_length:]], device=prompt.device))[0, -1]
            elif n_new == 0:
                logits = reader.read_prompt(prompt)
            else:
                logits = reader.read_token(text[-1], len(text) - 1)
            if adjust is not None:
                logits = adjust(torch.tensor(text, device=prompt.device), logits)
            token = vectors.likeliest(_scores(logits)) if temperature == 0 and n_new else -1
            if token == -1:
                probabilities = core_generate.next_token_probabilities(logits, temperature, top_k, top_p)
                token = core_generate.sample(probabilities, generator)
            if token == stop_id:
                return
            text.append(token)
            yield token
    finally:
        model.train(was_training)


def compile_kernels() -> None:
    """Run every CPU kernel of decoding once."""
    shape = config.ModelConfig(256, 128, d_model=4 * vectors.ROWS, n_layers=1, n_heads=4)
    model, prompt = models.TransformerLM(shape), torch.zeros(2, dtype=torch.long)
    # greedy decoding tries its configurations, with drafts and without, one after the other
    for temperature in (0.0, 1.0):
        assert len(list(generate(model, prompt, 120, temperature))) == 120


def _scores(logits: Float[Tensor, " vocab"]) -> np.ndarray:
    return logits.detach().float().cpu().numpy()
