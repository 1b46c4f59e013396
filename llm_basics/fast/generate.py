"""Text generation by CPU kernels (`cpu.decode`), or by a CUDA graph on a GPU (`cuda.cuda_graph`)."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.core import config
from llm_basics.core import functional as F
from llm_basics.core import generate as reference
from llm_basics.core import model as models
from llm_basics.fast import kernel_cache, numba_jit
from llm_basics.fast.cpu import autotuner, decode, threads, vectors, weights
from llm_basics.fast.cuda import cuda_graph
from llm_basics.systems import quantization

# prompts up to this length are read by the kernels; torch takes a millisecond for any
SHORT_PROMPT = 48

# whether to draft tokens with int8 weights; with several choices, the faster is measured during generation
DRAFTS: tuple[bool, ...] = (True, False)

# texts times weights: beyond this, a batch by torch, which reads the weights once for all texts, is faster
MAX_WEIGHTS_READ = 200_000_000

MAX_THREADS = 8
TEAM_LOCK = Lock()

# bound here because `swap` replaces the names in the reference module
reference_generate = reference.generate
probabilities_by_sorting = reference.next_token_probabilities


@functools.cache
def print_once(line: str) -> None:
    """Print a line to standard error, once per process."""
    print(line, file=sys.stderr)


class ThreadTeam:
    """Runs a kernel on several threads, with the same result as on one."""

    def __init__(self) -> None:
        self.meeting = np.zeros(2, np.int64)

    def run(self, size: int, work: Callable[[int, decode.Member], int]) -> int:
        """`work(number, member)` on each thread; returns the result of the first."""
        members = [decode.Member(number, size, self.meeting) for number in range(size)]
        # two teams that each hold some threads of the pool would deadlock
        with TEAM_LOCK if size > 1 else contextlib.nullcontext():
            try:
                others = [threads.helpers(MAX_THREADS - 1).submit(work, m.number, m) for m in members[1:]]
                result = work(0, members[0])
            except BaseException:
                # Ctrl-C, perhaps before this thread reached a barrier: release the others
                self.meeting[1] = 1
                raise
            for other in others:
                other.result()
        return result


class CPUDecoder:
    """Decodes a text token by token with the CPU kernels. Invalid after the model was trained."""

    def __init__(self, model: models.TransformerLM) -> None:
        self.model = model
        self.shape, self.weights = weights.shape_of(model), weights.weights_of(model)
        # keeps tensors alive whose addresses the kernels hold
        self.kept_alive = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.caches = model.make_kv_caches(batch=1)
        keys = torch.stack([cache.keys[0] for cache in self.caches])
        values = torch.stack([cache.values[0] for cache in self.caches])
        # the model writes keys and values of the prompt where the kernels read them
        for block, cache in enumerate(self.caches):
            cache.keys, cache.values = keys[block, None], values[block, None]
        # otherwise sums would be split among threads, and differ in the last bits
        is_even = keys.shape[-1] % vectors.ROWS == 0
        most = min(MAX_THREADS, self.shape.n_kv_heads) if threads.CAN_MEET and is_even else 1
        size = min(torch.get_num_threads(), most)
        n_parameters = sum(tensor.numel() for tensor in self.kept_alive)
        without_drafts = autotuner.DecodingConfig(size), autotuner.DecodingConfig(1)
        self.reading = autotuner.for_model(without_drafts, n_parameters)
        # int8 rows are multiplied by one token at a time, and drafts have no faster weights
        self.is_int8 = any(isinstance(m, quantization.QuantizedLinear) for m in model.modules())
        drafts = (False,) if self.is_int8 else DRAFTS
        configs = tuple(autotuner.DecodingConfig(n, has_drafts) for n in (size, 1) for has_drafts in drafts)
        self.writing = autotuner.for_model(configs, n_parameters)
        self.team, self.is_warm = ThreadTeam(), False
        self.states = weights.states_for(self.weights, keys.numpy(), values.numpy(), size)
        self.logits = torch.from_numpy(self.states[0].logits[0])
        self.n_drafted = decode.MOST_DRAFTED
        if not numba_jit.used_before("decode"):
            print_once("compiling CPU decoding kernels (about 10 s, cached; disable with --fast off)")

    @torch.no_grad()
    def read_prompt(self, tokens: Int[Tensor, " seq"]) -> Float[Tensor, " vocab"]:
        """The logits after a prompt."""
        if len(tokens) > SHORT_PROMPT:
            return self.model(tokens[None], caches=self.caches)[0, -1]
        at_a_time = 1 if self.is_int8 else decode.AT_A_TIME
        for position in range(0, len(tokens), at_a_time):
            self._read(tokens[position : position + at_a_time].numpy(), position)
        return self.model.postprocess_logits(self.logits)

    def read_token(self, token: int, position: int) -> Float[Tensor, " vocab"]:
        """The logits after `token`, in a buffer that the next call overwrites."""
        self._read(np.array([token]), position)
        return self.model.postprocess_logits(self.logits)

    def _read(self, tokens: np.ndarray, position: int) -> None:
        """Read tokens from `position`; writes the logits after the last to `self.logits`."""
        # kernels do not check bounds
        assert 0 < len(tokens) <= decode.AT_A_TIME, tokens
        assert 0 <= position <= self.model.config.context_length - len(tokens), position
        assert 0 <= tokens.min() <= tokens.max() < len(self.weights.token_embeddings), tokens

        def work(number: int, member: decode.Member) -> int:
            arguments = position, False, self.shape, self.weights, self.states[number], member
            decode.read_tokens(tokens, *arguments)
            return len(tokens)

        used = self.reading.next_config()
        if len(tokens) == 1:
            self._timed(self.reading, used, work)
        else:
            self.team.run(used.n_threads, work)

    def _timed(
        self,
        tuner: autotuner.Autotuner,
        used: autotuner.DecodingConfig,
        work: Callable[[int, decode.Member], int],
    ) -> int:
        """The result of `work`, a number of tokens, whose time is recorded."""
        began = time.perf_counter()
        n_tokens = self.team.run(used.n_threads, work)
        if self.is_warm:  # torch's threads that read the prompt may still be spinning before
            tuner.record(used, (time.perf_counter() - began) / max(n_tokens, 1))
        self.is_warm = True
        return n_tokens

    @functools.cached_property
    def rounded(self) -> tuple[decode.Weights, list[np.ndarray]]:
        """The int8 weights of drafts, and the arrays that hold them."""
        return weights.rounded(self.weights)

    def greedy_tokens(self, token: int, position: int, n: int) -> list[int]:
        """Up to `n` greedy tokens after `token`: those of one kernel call, before any near tie."""
        assert 0 <= position <= self.model.config.context_length - n, (position, n)
        assert 0 <= token < len(self.weights.token_embeddings), token
        n = min(n, self.writing.tokens_per_call())
        used = self.writing.next_config()
        drafting = self.rounded[0] if used.has_drafts else self.weights
        tokens = np.empty((len(self.states), n), np.int64)
        n_next = np.full((len(self.states), 1), self.n_drafted if used.has_drafts else decode.NEVER)

        def work(number: int, member: decode.Member) -> int:
            arguments = self.states[number], member, n_next[number], tokens[number]
            return decode.write_likeliest(token, position, self.shape, self.weights, drafting, *arguments)

        n_tokens = self._timed(self.writing, used, work)
        if used.has_drafts:
            self.n_drafted = n_next[0, 0]
        return tokens[0, :n_tokens].tolist()

    def close(self) -> None:
        """Keep what was measured for later processes."""
        self.reading.save()
        self.writing.save()


def next_token_probabilities(
    logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "... vocab"]:
    """`generate.next_token_probabilities`, bit for bit, by a partial sort where `top_k` is given.

    Sums are in the order of the reference.
    """
    kept = 1 if temperature == 0 else top_k
    size = logits.shape[-1]
    if kept is None or not 1 <= kept < size or not temperature >= 0 or not (top_p is None or 0 < top_p <= 1):
        return probabilities_by_sorting(logits, temperature, top_k, top_p)
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    probabilities = F.softmax(shifted / (temperature or 1.0))
    likeliest, ids = probabilities.topk(kept + 1)
    if (likeliest[..., -2] == likeliest[..., -1]).any():
        # among equally likely tokens lower ids rank first, which topk does not guarantee
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
    adjust: reference.LogitsFunction | None = None,
) -> Iterator[int]:
    """`generate.generate` by CPU kernels or a CUDA graph: the same tokens.

    Models with unsupported parts use the reference. At temperature 0, `generator` draws the first only.
    """
    if reason := weights.supports(model):
        print_once(f"text is generated by the reference, since {reason}")
    # the reference is faster than waiting for the compiler
    if reason or (not prompt.is_cuda and kernel_cache.is_pending("decoding")):
        settings = (temperature, top_k, top_p, stop_id, generator, adjust)
        yield from reference_generate(model, prompt, max_new_tokens, *settings)
        return
    if prompt.numel() == 0:
        raise ValueError("the prompt must have at least one token, got none")
    was_training, context_length, text = model.training, model.config.context_length, prompt.tolist()
    model.eval()
    decoder = cuda_graph.StaticStep(model) if prompt.is_cuda else CPUDecoder(model)
    try:
        while (n_new := len(text) - prompt.numel()) < max_new_tokens:
            greedy: list[int] = []
            n_free = context_length + 1 - len(text)
            if temperature == 0 and adjust is None and n_new and n_free > 0:
                n = min(max_new_tokens - n_new, n_free)
                greedy = decoder.greedy_tokens(text[-1], len(text) - 1, n)
            for token in greedy:
                if token == stop_id:
                    return
                text.append(token)
                yield token
            if greedy:
                continue
            if len(text) > context_length:
                logits = model(torch.tensor([text[-context_length:]], device=prompt.device))[0, -1]
            elif n_new == 0:
                logits = decoder.read_prompt(prompt)
            else:
                logits = decoder.read_token(text[-1], len(text) - 1)
            if adjust is not None:
                logits = adjust(torch.tensor(text, device=prompt.device), logits)
            token = vectors.likeliest(_scores(logits)) if temperature == 0 and n_new else -1
            if token == -1:
                probabilities = reference.next_token_probabilities(logits, temperature, top_k, top_p)
                token = reference.sample(probabilities, generator)
            if token == stop_id:
                return
            text.append(token)
            yield token
    finally:
        decoder.close()
        model.train(was_training)


def is_faster_one_by_one(model: models.TransformerLM, n_texts: int) -> bool:
    """Whether `n_texts` greedy texts are decoded faster by the CPU kernels, one after the other."""
    is_small = n_texts * model.config.n_matmul_params <= MAX_WEIGHTS_READ
    is_ready = not model.lm_head.weight.is_cuda and not kernel_cache.is_pending("decoding")
    return is_small and is_ready and not weights.supports(model)


def compile_kernels() -> None:
    """Run every CPU kernel of decoding once."""
    shape = config.ModelConfig(256, 128, d_model=4 * vectors.ROWS, n_layers=1, n_heads=4)
    model, prompt = models.TransformerLM(shape), torch.zeros(2, dtype=torch.long)
    # greedy decoding tries its configurations, with drafts and without, one after the other
    for temperature in (0.0, 1.0):
        assert len(list(generate(model, prompt, 120, temperature))) == 120


def _scores(logits: Float[Tensor, " vocab"]) -> np.ndarray:
    return logits.detach().float().cpu().numpy()
