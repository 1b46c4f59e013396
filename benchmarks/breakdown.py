"""Breaks the time of a training step, of encoding, or of one decoded token into parts, beside its limit.

uv run python benchmarks/breakdown.py training                 one step of a GPT-2 of 0.8 million parameters
uv run python benchmarks/breakdown.py training --shape llama
uv run python benchmarks/breakdown.py encoding --data prose.txt
uv run python benchmarks/breakdown.py decoding

Training: each operation of the CPU training kernels, timed alone with the arrays of a real step, on one
thread. Its limit is its floating-point operations at the rate of the fastest product, or its arrays read and
written once at the rate of a copy. Encoding: what each stage adds to the one before, on one thread. Its limit
is the text, read once. Decoding: the matrices of one token on one thread, whose limit is the weights, read
once. The minimum of several repetitions is shown, since other programs only add time.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train

from llm_basics import swap
from llm_basics.core import bpe, config, optim, tokenizer, trainer
from llm_basics.core import model as models
from llm_basics.data import documents
from llm_basics.fast import generate, numba_jit
from llm_basics.fast import tokenizer as fast_tokenizer
from llm_basics.fast.cpu import decode, interpreter, matmul, vectors
from llm_basics.fast.cpu import trainer as cpu_trainer
from llm_basics.fast.text import chunks, hash_table, scanner
from llm_basics.runs import process

REPETITIONS = 30

# as `python -m llm_basics.train` sets it before torch is imported
ENVIRONMENT = {"GOMP_SPINCOUNT": "3000"}


def main() -> None:
    """Print the table of one kind of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--shape", choices=["cpu", "llama"], default="cpu", help="the model")
    parser.add_argument("--data", help="a text to encode; default: the source of Python's library")
    options = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    process.tune_allocator()
    swap.use("fast", log=lambda line: None)
    WORK[options.work](options)


def shortest(work: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    """The shortest time of `work`, in seconds, after one untimed call."""
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def header(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


# --------------------------------------------------------------------------------------------------
# A training step


def training(options: argparse.Namespace) -> None:
    """The operations of the CPU training kernels, and what surrounds them."""
    shape, batch_size = train.SHAPES[options.shape]
    torch.manual_seed(0)
    model = models.TransformerLM(shape)
    tokens = torch.randint(shape.vocab_size, (batch_size, shape.context_length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if reason := cpu_trainer.unsupported(model, inputs):
        raise ValueError(f"the CPU training kernels must support the model; {reason}")
    step_config = config.TrainConfig(10**6, batch_size, lr=6e-4, warmup_steps=0)
    optimizer = trainer.make_optimizer(model, step_config)
    whole = shortest(lambda: trainer.train_step(model, optimizer, [(inputs, targets)], 1, step_config))
    learner = cpu_trainer.Learner(model, torch.get_num_threads())
    kernels = shortest(lambda: learner.learn(inputs, targets, 0.0))
    clipping = shortest(lambda: optim.clip_grad_norm_(model.parameters(), 1e9))
    updating = shortest(optimizer.step)
    n_threads = len(learner.programs)
    print(
        f"{options.shape}: one step {1000 * whole:.2f} ms on {n_threads} threads: loss and gradients "
        f"{1000 * kernels:.2f}, clipping {1000 * clipping:.2f}, optimizer {1000 * updating:.2f}, other "
        f"{1000 * (whole - kernels - clipping - updating):.2f}"
    )
    operations(learner, inputs, targets, shape)


def operations(
    learner: cpu_trainer.Learner, inputs: torch.Tensor, targets: torch.Tensor, shape: config.ModelConfig
) -> None:
    """Time each operation on one thread with `TOKENS` tokens, scaled to the tokens of a thread."""
    n = max(1, cpu_trainer.TOKENS // inputs.shape[1]) * inputs.shape[1]
    chunk, answers = inputs.flatten()[:n].numpy().copy(), targets.flatten()[:n].numpy().copy()
    task, own = learner.task._replace(seq=inputs.shape[1], share=1 / targets.numel()), learner.programs[0]

    def run(table: np.ndarray) -> None:
        interpreter.learn(table, chunk, answers, n, task, own.common, own.of_heads)

    def alone(step: np.ndarray) -> float:
        """Seconds of one operation; the program before it restores its arrays."""
        repeated = np.repeat(step[None], 4, 0)
        own.row.zero_()
        run(own.table)
        return shortest(lambda: run(repeated)) / 4

    names = {code: name for name, code in vars(interpreter).items() if name in OPERATIONS}
    seconds, limits, counts = defaultdict(float), defaultdict(float), defaultdict(int)
    timed: dict[tuple[int, ...], float] = {}
    peak, copying = product_rate(own), copy_rate()
    for step in own.table:
        sizes = tuple(step[5:7]) if names[step[0]] in PRODUCTS else ()
        key = int(step[0]), *map(int, sizes)
        name = " ".join(
            [names[step[0]].lower().replace("_", " "), *(["x".join(map(str, sizes))] * bool(sizes))]
        )
        timed[key] = timed.get(key) or alone(step)
        seconds[name] += timed[key]
        counts[name] += 1
        flops, n_bytes = cost(names[step[0]], sizes, n, shape)
        limits[name] += flops / peak if flops else n_bytes / copying
    scale = inputs.numel() / len(learner.programs) / n
    print(
        f"{inputs.numel() // len(learner.programs)} tokens per thread; products at most {peak / 1e9:.0f} "
        f"GFLOP/s, copies {copying / 1e9:.0f} GB/s on one thread\n"
    )
    header("operation", "times", "ms", "share", "limit, ms")
    total = sum(seconds.values())
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True):
        milliseconds, limit = 1000 * scale * seconds[name], 1000 * scale * limits[name]
        row(name, counts[name], f"{milliseconds:.2f}", f"{seconds[name] / total:.0%}", f"{limit:.2f}")
    row(
        "sum", len(own.table), f"{1000 * scale * total:.2f}", "", f"{1000 * scale * sum(limits.values()):.2f}"
    )
    own.row.zero_()
    together = shortest(lambda: run(own.table))
    row("all in one call, with colder caches", "", f"{1000 * scale * together:.2f}", "", "")


OPERATIONS = (
    "EMBED EMBED_BACKWARD NORMALIZE NORMALIZE_BACKWARD PROJECT PROJECT_BACKWARD WEIGHT_GRADIENT ADD_BIAS "
    "ROPE ROPE_BACKWARD ATTEND ATTEND_BACKWARD ACTIVATE ACTIVATE_BACKWARD LOSS"
).split()
PRODUCTS = ("PROJECT", "PROJECT_BACKWARD", "WEIGHT_GRADIENT")


def cost(operation: str, sizes: tuple[int, ...], n: int, shape: config.ModelConfig) -> tuple[float, float]:
    """FLOPs of an operation that multiplies matrices, or else the bytes of its arrays."""
    features = 4.0 * n * (shape.d_hidden if operation.startswith("ACTIVATE") else shape.d_model)
    if operation in PRODUCTS:
        return 2.0 * n * sizes[0] * sizes[1], 0.0
    if operation == "LOSS":
        return 6.0 * n * shape.d_model * shape.padded_vocab_size, 0.0
    if operation.startswith("ATTEND"):
        # causal: half of the scores; two products forward, five backward
        n_products = 5 if operation.endswith("BACKWARD") else 2
        return n_products * 1.0 * n * shape.context_length * shape.d_model, 0.0
    return 0.0, features * (4 if operation.endswith("BACKWARD") else 2)


def product_rate(own: Any) -> float:
    """FLOP/s of a product whose operands stay in the caches of one core."""
    m, n, k = 128, 256, 128
    arrays = [torch.rand(size) for size in (m * k, k * n, m * n)]
    a, b, out = (array.data_ptr() for array in arrays)

    def multiply() -> None:
        _products(a, b, out, m, n, k)

    return 2.0 * PRODUCTS_PER_CALL * m * n * k / shortest(multiply)


PRODUCTS_PER_CALL = 20


@numba_jit.jit
def _products(a: int, b: int, out: int, m: int, n: int, k: int) -> None:
    result = matmul.rows_at(out, n)
    for _ in range(PRODUCTS_PER_CALL):
        matmul.product(matmul.rows_at(a, k), matmul.columns_at(b, n), result, result, m, n, k)


def copy_rate() -> float:
    """Bytes read and written per second by a copy within the second-level cache."""
    source, target = np.ones(1 << 16, np.float32), np.empty(1 << 16, np.float32)

    def copy() -> None:
        for _ in range(100):
            target[:] = source

    return 100 * 2 * source.nbytes / shortest(copy)


# --------------------------------------------------------------------------------------------------
# Encoding


def encoding(options: argparse.Namespace) -> None:
    """The stages of encoding with a vocabulary of 10,000 tokens learned from the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.data or Path(folder) / "stdlib.txt")
        if not options.data:
            texts = documents.read_documents(documents.stdlib_files())
            path.write_bytes("\n".join(document.text for document in texts).encode())
        text = path.read_bytes().decode("utf-8")
        chosen = tokenizer.Tokenizer(*bpe.train_bpe(path, 10_000))
    assert isinstance(chosen, fast_tokenizer.Tokenizer)
    cache, initial = chosen._take_cache(), chosen._initial_cache
    content, n_bytes = scanner.padded(text.encode()), len(text.encode())
    arguments = content, n_bytes, scanner.classes(), cache.table.slots, cache.table.pool
    parts = [(part, *chunks.split(part, {})) for part in fast_tokenizer._chunks(text, ())]

    def encode_parts(used: fast_tokenizer.PretokenCache) -> int:
        return sum(len(chosen._ids_of(used, *part)) for part in parts)

    n_tokens = encode_parts(cache)
    stages = {
        "cut into pre-tokens": shortest(lambda: _scan(*arguments, 0)),
        "look up in the cache": shortest(lambda: _scan(*arguments, 1)),
        "write ids, chunk by chunk": shortest(lambda: encode_parts(cache)),
        "UTF-8, and one array": shortest(lambda: chosen.encode_to_array(text, 1)),
    }
    reading = shortest(lambda: content.sum(dtype=np.uint8))
    print(
        f"{n_bytes / 1e6:.1f} MB, {n_tokens:,} tokens, one thread; reading the text alone takes "
        f"{1000 * reading:.1f} ms\n"
    )
    header("stage", "ms", "ns per token")
    before = 0.0
    for name, seconds in stages.items():
        row(name, f"{1000 * (seconds - before):.1f}", f"{1e9 * (seconds - before) / n_tokens:.1f}")
        before = seconds
    row("sum: `encode_to_array`, known pre-tokens", f"{1000 * before:.1f}", f"{1e9 * before / n_tokens:.1f}")
    copies = iter([initial.copy() for _ in range(REPETITIONS + 1)])
    merging = shortest(lambda: encode_parts(next(copies))) - stages["write ids, chunk by chunk"]
    row(
        "merge pre-tokens that are not in the cache",
        f"{1000 * merging:.1f}",
        f"{1e9 * merging / n_tokens:.1f}",
    )
    as_list = shortest(lambda: chosen.encode_ordinary(text), 5) - before
    row("a list instead of an array", f"{1000 * as_list:.1f}", f"{1e9 * as_list / n_tokens:.1f}")


@numba_jit.jit
def _scan(
    text: np.ndarray, n: int, classes: np.ndarray, slots: np.ndarray, pool: np.ndarray, with_lookup: int
) -> int:
    """The stages of `text.encode` up to the look-up; returns a sum, so that none is optimized away."""
    text, classes = numba_jit.borrowed(text), numba_jit.borrowed(classes)
    slots, pool = numba_jit.borrowed(slots), numba_jit.borrowed(pool)
    i, total = 0, 0
    while i < n:
        end = scanner.next_end(text, i, n, classes, scanner.GPT2)
        if with_lookup:
            low, high = hash_table.key_of(text, i, end - i)
            total += hash_table.find(slots, pool, text, i, end - i, low, high)
        total += end
        i = end
    return total


# --------------------------------------------------------------------------------------------------
# Decoding


def decoding(options: argparse.Namespace) -> None:
    """One token of a model with random weights: its matrices, and everything else."""
    shape = dataclasses.replace(train.SHAPES[options.shape][0], vocab_size=4096, context_length=256)
    torch.manual_seed(0)
    decoder = generate.CPUDecoder(models.TransformerLM(shape).eval())
    w, state = decoder.weights, decoder.states[0]
    alone = decode.Member(0, 1, np.zeros(2, np.int64))
    position = 100
    whole = shortest(
        lambda: decode.read_tokens(np.array([5]), position, False, decoder.shape, w, state, alone), 300
    )
    size = 4 * shape.n_matmul_params
    bandwidth = bytes_per_second(size)
    print(
        f"{options.shape}, vocabulary {shape.vocab_size}, position {position}, one thread, no drafts: "
        f"{1e6 * whole:.0f} us; products with {size / 1e6:.1f} MB of weights, which are read at "
        f"{bandwidth / 1e9:.0f} GB/s\n"
    )
    header("part", "us", "share", "limit, us")
    kinds = {
        "queries, keys, values": [(w.q, w.q_bias, state.normed, state.q)]
        + [(w.k, w.k_bias, state.normed, state.k), (w.v, w.v_bias, state.normed, state.v)],
        "attention output": [(w.output, w.output_bias, state.head_output, state.added)],
        "feed-forward": [(w.up, w.up_bias, state.normed, state.hidden)]
        + [(w.gated, w.up_bias, state.normed, state.gated)] * bool(len(w.gated))
        + [(w.down, w.down_bias, state.hidden, state.added)],
        "logits": [(w.lm_head, [w.lm_head_bias], state.normed, state.logits)],
    }
    # all matrices in turn, as for a token, so that each is as far from the core as it would be
    seconds = dict.fromkeys(kinds, np.inf)
    for _ in range(300):
        for name, products in kinds.items():
            start = time.perf_counter()
            for matrices, biases, x, out in products:
                for matrix, bias in zip(matrices, biases, strict=True):
                    vectors.multiply(matrix, x, 1, bias, out, 0, out.shape[1])
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    for name, products in kinds.items():
        n_bytes = sum(4 * len(matrices) * x.shape[1] * out.shape[1] for matrices, _, x, out in products)
        limit = f"{1e6 * n_bytes / bandwidth:.0f}"
        row(name, f"{1e6 * seconds[name]:.0f}", f"{seconds[name] / whole:.0%}", limit)
    rest = whole - sum(seconds.values())
    row("attention over the cache, norms, activations", f"{1e6 * rest:.0f}", f"{rest / whole:.0%}", "")


def bytes_per_second(n_bytes: int) -> float:
    """The rate at which one core reads an array of `n_bytes` again and again."""
    one, other = (np.ones(n_bytes // 8, np.float32) for _ in range(2))
    return n_bytes / shortest(lambda: np.dot(one, other), 300)


WORK = {"training": training, "encoding": encoding, "decoding": decoding}

if __name__ == "__main__":
    main()
