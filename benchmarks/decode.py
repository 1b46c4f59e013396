"""How fast does a model write, beside `generate` of transformers with the same weights?

uv run python benchmarks/decode.py                    two GPT-2s: 4 blocks of 128 features, 6 of 384
uv run python benchmarks/decode.py --device cuda

Each contender runs in a process of its own, in turns, for some rounds; medians are compared, of the number of
threads that suits each best. A process first writes such a text, so that libraries and machine code are
loaded before the clock starts. All write the likeliest text, and its digest is compared.

A token costs a pass over all weights. How many bytes can be read in a second is measured too, by inner
products of two vectors as large as the weights together; the share of it that a contender uses is shown.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from llm_basics import swap
from llm_basics.core import config, device, generate
from llm_basics.core import model as models
from llm_basics.inference import engine

SHAPES = {"4x128": (4, 128, 4), "6x384": (6, 384, 6)}
VOCAB_SIZE, CONTEXT_LENGTH, N_PROMPT = 4096, 256, 16


def main() -> None:
    """Measure what the command line asks for, and print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens in a text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), help="who writes")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        torch.set_num_threads(options.threads[0])
        print(json.dumps(measured(options.contender, options.shape, options.tokens, options.device)))
        return
    print(f"{options.tokens} tokens after {N_PROMPT}; {options.rounds} rounds; {os.cpu_count()} cores")
    for shape in [options.shape] if options.shape else SHAPES:
        compare(shape, options)


def compare(shape: str, options: argparse.Namespace) -> None:
    """Run all contenders in turns, and print their medians."""
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name in [*options.only, "read"]:
            for n_threads in options.threads:
                command = [sys.executable, __file__, "--contender", name, "--shape", shape]
                command += ["--threads", str(n_threads), "--tokens", str(options.tokens)]
                command += ["--device", options.device]
                environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
                if name == "ours":
                    # as the programs set it
                    environment["GOMP_SPINCOUNT"] = "3000"
                run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                results.setdefault((name, n_threads), []).append(json.loads(run.stdout.splitlines()[-1]))

    def per_second(name: str, n_threads: int) -> float:
        return statistics.median(r["per_second"] for r in results[name, n_threads])

    best = {
        name: max(options.threads, key=lambda n, name=name: per_second(name, n))  # type: ignore[misc]
        for name in [*options.only, "read"]
    }
    read = per_second("read", best["read"])
    theirs = per_second("transformers", best["transformers"]) if "transformers" in best else float("nan")
    n_bytes = results["read", best["read"]][0]["bytes"]
    print(f"\n**{shape}**, {n_bytes / 1e6:.1f} MB of weights a token, {read / 1e9:.0f} GB/s\n")
    print("| writes | tokens/s (all rounds) | threads | times transformers | of what can be read | text |")
    print("|---|---|---|---|---|---|")
    for name, n_threads in [(name, best[name]) for name in options.only]:
        rates = sorted(r["per_second"] for r in results[name, n_threads])
        middle, every = statistics.median(rates), " ".join(f"{rate:,.0f}" for rate in rates)
        texts = "/".join(sorted({r["text"] for r in results[name, n_threads]}))
        # several texts share a pass over the weights
        passes = middle / CONTENDERS[name][1]
        print(
            f"| {name} | {middle:,.0f} ({every}) | {n_threads} | {middle / theirs:.1f} "
            f"| {passes * n_bytes / read:.0%} | {texts} |"
        )


def measured(name: str, shape: str, n_tokens: int, place: str) -> dict[str, Any]:
    """Tokens a second, and a few letters that tell texts apart; of `read`, bytes a second."""
    if name == "ours":
        # as the programs do
        device.tune_allocator()
    model = gpt2(shape).to(place)
    if name == "read":
        n_bytes = 4 * sum(p.numel() for key, p in model.named_parameters() if "position" not in key)
        return {"per_second": bytes_per_second(n_bytes, place), "bytes": n_bytes}
    make, n_texts = CONTENDERS[name]
    prompt = torch.randint(VOCAB_SIZE, (N_PROMPT,), generator=torch.Generator().manual_seed(0)).to(place)
    write = make(model, prompt, n_texts)
    write(n_tokens)
    start = time.perf_counter()
    ids = write(n_tokens)
    seconds = time.perf_counter() - start
    assert len(ids) == n_tokens
    text = hashlib.sha256(repr(ids).encode()).hexdigest()[:8]
    return {"per_second": n_texts * n_tokens / seconds, "text": text}


def bytes_per_second(n_bytes: int, place: str) -> float:
    """Read as many bytes as the weights have, again and again, and nothing else."""
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
# One model, three times

Write = Callable[[int], list[int]]


def gpt2(shape: str) -> models.TransformerLM:
    """A GPT-2 of random weights, large enough for scores that are no near ties."""
    n_layers, d_model, n_heads = SHAPES[shape]
    torch.manual_seed(0)
    options = config.ModelConfig(
        vocab_size=VOCAB_SIZE,
        context_length=CONTEXT_LENGTH,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        norm="layer",
        position="learned",
        ffn="gelu_tanh",
        tie_embeddings=True,
        bias=True,
        init="gpt2",
    )
    model = models.TransformerLM(options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def fast(model: models.TransformerLM, prompt: torch.Tensor, _: int) -> Write:
    swap.use("fast", lambda line: None)
    return reference(model, prompt, _)


def reference(model: models.TransformerLM, prompt: torch.Tensor, _: int) -> Write:
    return lambda n: list(generate.generate(model, prompt, n, temperature=0.0))


def at_once(model: models.TransformerLM, prompt: torch.Tensor, n_texts: int) -> Write:
    return lambda n: engine.generate_batch(model, [prompt] * n_texts, n, temperature=0.0)[0]


def transformers(model: models.TransformerLM, prompt: torch.Tensor, n_texts: int) -> Write:
    theirs = hugging_face(model).to(prompt.device)

    def write(n: int) -> list[int]:
        ids = theirs.generate(
            prompt.repeat(n_texts, 1), max_new_tokens=n, do_sample=False, use_cache=True, pad_token_id=0
        )
        return ids[0, len(prompt) :].tolist()

    return write


@torch.no_grad()
def hugging_face(model: models.TransformerLM) -> Any:
    """The GPT-2 of transformers with the weights of `model`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context_length,
            n_embd=c.d_model,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            layer_norm_epsilon=c.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    theirs.transformer.wte.weight.copy_(model.token_embeddings.weight)
    theirs.transformer.wpe.weight.copy_(model.position_embeddings.weight)
    pairs = [(theirs.transformer.ln_f, model.ln_final)]
    blocks: list[Any] = list(model.layers)
    for block, own in zip(theirs.transformer.h, blocks, strict=True):
        pairs += [(block.ln_1, own.ln1), (block.ln_2, own.ln2)]
        qkv = (own.attn.q_proj, own.attn.k_proj, own.attn.v_proj)
        linears = [(block.attn.c_attn, qkv), (block.attn.c_proj, (own.attn.output_proj,))]
        linears += [(block.mlp.c_fc, (own.ffn.w1,)), (block.mlp.c_proj, (own.ffn.w2,))]
        for linear, parts in linears:
            # theirs are (d_in, d_out)
            linear.weight.copy_(torch.cat([part.weight for part in parts]).T)
            linear.bias.copy_(torch.cat([part.bias for part in parts]))
    for norm, own in pairs:
        norm.weight.copy_(own.weight)
        norm.bias.copy_(own.bias)
    return theirs


# how each writes, and how many texts at once
CONTENDERS: dict[str, tuple[Callable[[models.TransformerLM, torch.Tensor, int], Write], int]] = {
    "ours": (fast, 1),
    "our reference": (reference, 1),
    "transformers": (transformers, 1),
    "our reference, 8 texts": (at_once, 8),
    "our reference, 32 texts": (at_once, 32),
}

if __name__ == "__main__":
    main()
