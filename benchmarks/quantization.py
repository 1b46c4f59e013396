"""Quantized inference beside float32: perplexity, memory and speed of one run by mode.

python benchmarks/quantization.py RUN                    a run directory with its held-out split
python benchmarks/quantization.py RUN --data text.txt --tokens 100000

Modes alternate: every round generates from the same prompt once in each, with the kernels of `generate` and
with --fast off. A row has the medians of the rounds, and their ratios to float32.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from llm_basics import swap
from llm_basics.cli import commands
from llm_basics.core import evaluate, generate
from llm_basics.core import model as models
from llm_basics.evaluation import compare_models, log_likelihood, metrics
from llm_basics.inference import engine, quantized_model
from llm_basics.runs import checkpoint, process, run_dir

MODES = {
    "float32": ("none", "float32"),
    "int8": ("int8", "float32"),
    "int4": ("int4", "float32"),
    "float32, int8 cache": ("none", "int8"),
    "int8, int8 cache": ("int8", "int8"),
    "int4, int8 cache": ("int4", "int8"),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    run: tyro.conf.Positional[str] = "newest"
    """Run directory."""
    data: str | None = None
    """Text to evaluate on. None: the run's held-out split."""
    tokens: int = 10**9
    """Tokens of the text, at most."""
    new_tokens: int = 100
    """Tokens to generate."""
    rounds: int = 5
    """Rounds of generating."""


def tokens_per_second(model: models.TransformerLM, prompt: torch.Tensor, n: int) -> float:
    """Speed of sampling `n` tokens after a prompt, with the prompt read."""
    began = time.perf_counter()
    found = list(generate.generate(model, prompt, n, 0.8, generator=torch.Generator().manual_seed(0)))
    return len(found) / (time.perf_counter() - began)


def main(options: Options) -> None:
    """Print a table with a row for each mode."""
    process.tune_allocator()
    folder = run_dir.resolve(options.run)
    path = checkpoint.find(folder / run_dir.CHECKPOINTS, "latest")
    _, tokenizer = engine.load_run(folder)
    asked = commands.EvaluateConfig(data=options.data)
    name, tokens = compare_models.find_text(Path(folder), path, tokenizer, asked)
    tokens = tokens[: options.tokens]
    found = {}
    for mode, choice in MODES.items():
        model, _ = engine.load_run(folder)
        quantized_model.quantize_(model, *choice)
        found[mode] = model
    lengths = evaluate.token_lengths(tokenizer, found["float32"].config.vocab_size)
    with swap.restored():
        swap.use("fast")
        perplexity = {
            mode: metrics.measure(log_likelihood.score_text(model, tokens, batch_size=32), lengths).perplexity
            for mode, model in found.items()
        }
    prompt = torch.from_numpy(tokens[:16].astype("int64"))
    speeds: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for fast in ("on", "off"):
            for mode, model in found.items():
                with swap.restored():
                    if fast == "on":
                        swap.use("fast")
                    speed = tokens_per_second(model, prompt, options.new_tokens)
                # the first round compiles kernels and fills caches
                if number:
                    speeds.setdefault((mode, fast), []).append(speed)
    print(
        f"\n{name}, {len(tokens):,} tokens; {options.new_tokens} tokens generated, {options.rounds} rounds\n"
    )
    print("| mode | perplexity | | weights, kB | cache, bytes per token | tokens/s | `--fast off` |")
    print("|---|---|---|---|---|---|---|")
    medians = {key: statistics.median(of_round) for key, of_round in speeds.items()}
    for mode, model in found.items():
        change = perplexity[mode] / perplexity["float32"] - 1
        cells = [
            mode,
            f"{perplexity[mode]:.3f}",
            f"{change:+.3%}",
            f"{quantized_model.weight_bytes(model) / 1000:,.0f}",
        ]
        cells.append(f"{quantized_model.cache_bytes_per_token(model):,}")
        for fast in ("on", "off"):
            ratio = medians[mode, fast] / medians["float32", fast]
            cells.append(f"{medians[mode, fast]:,.0f} ({ratio:.2f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
