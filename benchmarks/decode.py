"""Benchmarks greedy decoding of trained models against `generate` of transformers.

uv run --group benchmark python benchmarks/decode.py --run runs/NAME       a run of `llm-basics train`
uv run --group benchmark python benchmarks/decode.py                       trains two models first
uv run --group benchmark python benchmarks/decode.py --device cuda --threads 1

Without --run, two GPT-2s (4 blocks of 128 features, 6 of 384) are trained for a few hundred steps on the
default data; later calls reuse the runs. Trained weights matter: with random weights nearly all drafts are
accepted.

Each contender runs in a separate process, in turns, for some rounds; medians are compared, each with its best
number of threads. A process first generates one text, so that libraries and machine code are loaded before
timing. All decode greedily, and a digest of each text is shown.

"ours" measures during generation whether int8 drafts pay (`fast/cpu/decode.py`); "ours, drafts" always
drafts, "ours, no drafts" never.

A token costs a pass over all weights. Memory bandwidth is measured by dot products of two vectors that
together are as large as the weights; the table shows the fraction of it that each contender uses.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_basics import swap
from llm_basics.core import generate
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.inference import engine
from llm_basics.interop import hf_export
from llm_basics.runs import process, run_dir

# the models to train: their options and steps
TRAINED = {
    "4x128": ("--model.n_layers 4 --model.d_model 128 --model.n_heads 4 --train.batch_size 8", 600),
    "6x384": ("--model.n_layers 6 --model.d_model 384 --model.n_heads 6 --train.batch_size 4", 300),
}
OPTIONS = (
    "--config gpt2-nano --tokenizer bpe --model.vocab_size 4096 --model.context_length 256 "
    "--train.optimizer muon --train.lr 0.01 --train.eval_every 100 --train.eval_batches 4"
)
PROMPT = "    def read(self, path, encoding=None):\n        with open(path, encoding=encoding) as file:\n"
N_PROMPT = 16

# texts are generated for at least so long in a round
MIN_SECONDS = 1.0


def main() -> None:
    """Run the benchmark and print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", default=[], help="run directories of trained models")
    parser.add_argument("--shape", choices=TRAINED, help="without --run, only this model")
    parser.add_argument("--prompt", default=PROMPT, help=f"the first {N_PROMPT} tokens are used")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens per text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--only", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), help="the contenders"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        torch.set_num_threads(options.threads[0])
        print(json.dumps(measured(options.contender, options)))
        return
    shapes = [] if options.run else [options.shape] if options.shape else list(TRAINED)
    folders = [Path(folder) for folder in options.run] or [trained(shape) for shape in shapes]
    print(f"{options.tokens} tokens after {N_PROMPT}; {options.rounds} rounds; {os.cpu_count()} cores")
    for folder in folders:
        compare(folder, options)


def trained(shape: str) -> Path:
    """The run directory of a model in `TRAINED`; trains it if missing."""
    (given, steps), folder = TRAINED[shape], run_dir.RUNS / f"decode-{shape}"
    if run_dir.checkpoint_path(folder, steps).exists():
        return folder
    print(f"training {folder} for {steps} steps on the default data; later calls reuse it", flush=True)
    command = [sys.executable, "-m", "llm_basics.train", "--train.steps", str(steps)]
    if run_dir.checkpoints(folder):
        command += ["--resume", str(folder)]
    else:
        command += [*OPTIONS.split(), *given.split(), "--run_dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Run all contenders in turns, and print medians."""
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in [*options.only, "read"]:
            for n_threads in options.threads:
                command = [sys.executable, __file__, "--contender", name, "--run", str(folder)]
                command += ["--threads", str(n_threads), "--tokens", str(options.tokens)]
                command += ["--device", options.device, "--prompt", options.prompt]
                environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
                if name.startswith("ours"):
                    # as `llm-basics` sets it
                    environment["GOMP_SPINCOUNT"] = "3000"
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                results.setdefault((name, n_threads), []).append(json.loads(run.stdout.splitlines()[-1]))

    def per_second(name: str, n_threads: int) -> float:
        return statistics.median(r["per_second"] for r in results[name, n_threads])

    best = {
        name: max(options.threads, key=lambda n, name=name: per_second(name, n))  # type: ignore[misc]
        for name in [*options.only, "read"]
    }
    read = per_second("read", best["read"])
    # by the number of texts
    theirs = {CONTENDERS[n][1]: per_second(n, best[n]) for n in best if n.startswith("transformers")}
    n_bytes = results["read", best["read"]][0]["bytes"]
    print(f"\n**{folder.name}**, {n_bytes / 1e6:.1f} MB of weights a token, {read / 1e9:.0f} GB/s\n")
    print("| contender | tokens/s (all rounds) | threads | times transformers | of bandwidth | text |")
    print("|---|---|---|---|---|---|")
    for name, n_threads in [(name, best[name]) for name in options.only]:
        rates = sorted(r["per_second"] for r in results[name, n_threads])
        middle, every = statistics.median(rates), " ".join(f"{rate:,.0f}" for rate in rates)
        texts = "/".join(sorted({r["text"] for r in results[name, n_threads]}))
        # several texts share a pass over the weights
        n_texts = CONTENDERS[name][1]
        passes, ratio = middle / n_texts, middle / theirs.get(n_texts, math.nan)
        print(
            f"| {name} | {middle:,.0f} ({every}) | {n_threads} | {ratio:.1f} "
            f"| {passes * n_bytes / read:.0%} | {texts} |"
        )


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and a digest of the text; for `read`, bytes per second."""
    make, n_texts = CONTENDERS.get(name, (reference, 1))
    if name.startswith("ours"):
        # as `llm-basics` does
        swap.use("fast", lambda line: None)
        process.tune_allocator()
    model, tokenizer = engine.load_run(options.run[0], options.device)
    model.eval()
    if name == "read":
        n_bytes = 4 * model.config.n_matmul_params
        return {"per_second": bytes_per_second(n_bytes, options.device), "bytes": n_bytes}
    prompt = torch.tensor(tokenizer.encode(options.prompt)[:N_PROMPT], device=options.device)
    longest = model.config.context_length - len(prompt)
    n_tokens = options.tokens
    if n_tokens > longest:
        raise ValueError(f"--tokens must be at most {longest} after the prompt, got {n_tokens}")
    write = make(model, tokenizer, prompt, n_texts)
    write(n_tokens)
    seconds, n_written = 0.0, 0
    while seconds < MIN_SECONDS:
        start = time.perf_counter()
        ids = write(n_tokens)
        seconds += time.perf_counter() - start
        n_written += n_texts * len(ids)
    assert len(ids) == n_tokens
    text = hashlib.sha256(repr(ids).encode()).hexdigest()[:8]
    return {"per_second": n_written / seconds, "text": text}


def bytes_per_second(n_bytes: int, place: str) -> float:
    """Memory bandwidth for an array of the size of the weights."""
    one, other = (torch.ones(n_bytes // 8, device=place) for _ in range(2))
    rounds = max(10, 2**31 // n_bytes)
    for timed in (False, True):
        start = time.perf_counter()
        for _ in range(rounds):
            result = torch.dot(one, other)
        result.item()
        if timed:
            return rounds * n_bytes / (time.perf_counter() - start)
    raise AssertionError


# --------------------------------------------------------------------------------------------------
# Contenders

Write = Callable[[int], list[int]]
Make = Callable[[models.TransformerLM, tokenizers.Tokenizer, torch.Tensor, int], Write]


def reference(model: models.TransformerLM, _: Any, prompt: torch.Tensor, n_texts: int) -> Write:
    return lambda n: list(generate.generate(model, prompt, n, temperature=0.0))


def with_drafts(*choices: bool) -> Make:
    """Ours with drafts, without, or (both given) with the faster."""

    def make(model: models.TransformerLM, tokenizer: Any, prompt: torch.Tensor, n_texts: int) -> Write:
        from llm_basics.fast import generate as fast

        fast.DRAFTS = choices
        return reference(model, tokenizer, prompt, n_texts)

    return make


def at_once(model: models.TransformerLM, _: Any, prompt: torch.Tensor, n_texts: int) -> Write:
    return lambda n: engine.generate_batch(model, [prompt] * n_texts, n, temperature=0.0)[0]


def transformers(
    model: models.TransformerLM, tokenizer: tokenizers.Tokenizer, prompt: torch.Tensor, n_texts: int
) -> Write:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        hf_export.export(model, tokenizer, Path(folder), card="")
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval().to(prompt.device)
    # never stop early
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None

    def write(n: int) -> list[int]:
        ids = theirs.generate(
            prompt.repeat(n_texts, 1), max_new_tokens=n, do_sample=False, use_cache=True, pad_token_id=0
        )
        return ids[0, len(prompt) :].tolist()

    return write


# the generate function and the number of texts per batch
CONTENDERS: dict[str, tuple[Make, int]] = {
    "ours": (with_drafts(True, False), 1),
    "ours, drafts": (with_drafts(True), 1),
    "ours, no drafts": (with_drafts(False), 1),
    "reference": (reference, 1),
    "transformers": (transformers, 1),
    "ours, 8 texts": (at_once, 8),
    "transformers, 8 texts": (transformers, 8),
    "ours, 32 texts": (at_once, 32),
    "transformers, 32 texts": (transformers, 32),
}

if __name__ == "__main__":
    main()
