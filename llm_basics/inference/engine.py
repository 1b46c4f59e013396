"""Text generation with a trained model: one prompt as a stream, or several as a batch."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llm_basics import swap
from llm_basics.cli import commands, generation_options
from llm_basics.core import config, presets, vocabulary
from llm_basics.core import device as devices
from llm_basics.core import functional as F
from llm_basics.core import generate as core_generate
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import tokenizer_formats
from llm_basics.inference import adapters, detokenizer, quantized_model
from llm_basics.runs import checkpoint, process, run_dir

# --------------------------------------------------------------------------------------------------
# Token ids


@torch.no_grad()
def generate_batch(
    model: models.TransformerLM,
    prompts: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
    adjust: core_generate.LogitsFunction | None = None,
    ends_with: Callable[[int, int], bool] = lambda i, token: False,
    record: Callable[[int, float], None] | None = None,
) -> list[list[int]]:
    """Generate for a batch of prompts; each result equals that of `generate` with the same generator.

    The common length of the prompts is one forward pass; then every sequence advances by one token per step,
    in longer prompts by the next prompt token, without padding. Finished sequences leave the batch.
    `ends_with(i, token)` is called with each new token of sequence `i`, and returns whether it is the last;
    `record(i, log_probability)` before it, with the model's value, without `adjust` and temperature.
    """
    if not all(map(Tensor.numel, prompts)):
        raise ValueError("each prompt must have at least one token, got one with none")
    if temperature == 0 and adjust is record is None and swap.is_faster_one_by_one(model, len(prompts)):
        return _generate_one_by_one(model, prompts, max_new_tokens, stop_id, ends_with)
    texts = [prompt.tolist() for prompt in prompts]
    finished, active = set[int](), list(range(len(texts))) if max_new_tokens else []
    length = min(map(len, texts), default=0)
    context_length, device = model.config.context_length, model.token_embeddings.weight.device
    was_training, caches = model.training, model.make_kv_caches(batch=len(texts))
    model.eval()
    try:
        while active:
            is_cached = length <= context_length
            first = caches[0].length if is_cached else length - context_length
            tokens = torch.tensor([texts[i][first:length] for i in active], device=device)
            logits = model(tokens, caches=caches if is_cached else None)[:, -1]
            scores = F.log_softmax(F.to_float32(logits)).cpu() if record is not None else None
            if adjust is not None:
                prefixes = [torch.tensor(texts[i][:length], device=device) for i in active]
                logits = torch.stack([adjust(ids, row) for ids, row in zip(prefixes, logits, strict=True)])
            probabilities = core_generate.next_token_probabilities(logits, temperature, top_k, top_p).cpu()
            for row, i in enumerate(active):
                if len(texts[i]) == length:
                    token = core_generate.sample(probabilities[row], generators[i] if generators else None)
                    texts[i].append(token)
                    if record is not None and scores is not None:
                        record(i, float(scores[row, token]))
                    is_full = len(texts[i]) == len(prompts[i]) + max_new_tokens
                    if token == stop_id or ends_with(i, token) or is_full:
                        finished.add(i)
            length += 1
            rows = [row for row, i in enumerate(active) if i not in finished]
            if len(rows) < len(active):
                active = [active[row] for row in rows]
                for cache in caches:
                    cache.select(torch.tensor(rows, dtype=torch.long, device=device))
    finally:
        model.train(was_training)
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [text[:-1] if text and text[-1] == stop_id else text for text in new]


def _generate_one_by_one(
    model: models.TransformerLM,
    prompts: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    stop_id: int | None,
    ends_with: Callable[[int, int], bool],
) -> list[list[int]]:
    """`generate_batch` at temperature 0, one sequence after the other."""
    texts: list[list[int]] = [[] for _ in prompts]
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for token in core_generate.generate(model, prompt, max_new_tokens, 0.0, stop_id=stop_id):
            text.append(token)
            if ends_with(i, token):
                break
    return texts


def make_logits_processor(
    temperature: float, min_p: float | None, repetition_penalty: float
) -> core_generate.LogitsProcessor | None:
    """A logits processor with these settings; None if all are off."""
    if not min_p and repetition_penalty == 1:
        return None
    return core_generate.LogitsProcessor(temperature, min_p or 0.0, repetition_penalty)


# --------------------------------------------------------------------------------------------------
# Text


def prompt_tokens(
    model: models.TransformerLM, tokenizer: tokenizers.Tokenizer, prompt: str
) -> Int[Tensor, " seq"]:
    """Encode `prompt`, on the device of the model; an empty prompt starts a new document."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.end_of_text_id]
    return torch.tensor(ids, device=model.token_embeddings.weight.device)


def complete(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stops: Sequence[str] = (),
    adjust: core_generate.LogitsFunction | None = None,
) -> Iterator[str]:
    """Stream the continuation of `prompt`, up to the end of the document or the first stop string."""
    new = core_generate.generate(
        model,
        prompt_tokens(model, tokenizer, prompt),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        stop_id=tokenizer.end_of_text_id,
        generator=torch.Generator().manual_seed(seed),
        adjust=adjust,
    )
    return detokenizer.detokenize(tokenizer, new, stops)


def complete_batch(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] = (),
    stops: Sequence[str] = (),
    adjust: core_generate.LogitsFunction | None = None,
) -> list[str]:
    """Continue a batch of prompts; each text equals that of `complete` with the same seed."""
    ids = [prompt_tokens(model, tokenizer, prompt) for prompt in prompts]
    options = generation_options.SamplingOptions(max_new_tokens, temperature, top_k, top_p)
    texts = continue_batch(model, tokenizer, ids, seeds, options, tokenizer.end_of_text_id, stops, adjust)
    return [text for text, _ in texts]


def continue_batch(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    prompts: Sequence[Int[Tensor, " _"]],
    seeds: Sequence[int],
    options: generation_options.SamplingOptions,
    stop_id: int,
    stops: Sequence[str] = (),
    adjust: core_generate.LogitsFunction | None = None,
    record: Callable[[int, float], None] | None = None,
) -> list[tuple[str, bool]]:
    """The continuations of encoded prompts as text, and whether each ended before the maximum length."""
    streams = [detokenizer.Detokenizer(tokenizer, stops) for _ in prompts]
    texts = ["" for _ in prompts]

    def ends_with(i: int, token: int) -> bool:
        texts[i] += streams[i].read(token)
        return streams[i].is_over

    found = generate_batch(
        model,
        prompts,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        stop_id=stop_id,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        adjust=adjust,
        ends_with=ends_with,
        record=record,
    )
    ended = [
        len(ids) < options.max_new_tokens or stream.is_over
        for ids, stream in zip(found, streams, strict=True)
    ]
    return [(text + stream.close(), end) for text, stream, end in zip(texts, streams, ended, strict=True)]


# --------------------------------------------------------------------------------------------------
# Loading


def initial_weights(
    folder: str | Path, shape: config.ModelConfig, which: str = "latest"
) -> dict[str, Tensor]:
    """The weights of a run for a model of `shape`, with new rows in the embeddings for new tokens."""
    source, tokenizer = load_run(folder, which=which)
    # the rows after these are padding, or were never trained
    n_known = min(tokenizer.vocab_size, source.config.vocab_size)
    weights = source.state_dict()
    for name in weights:
        if name.startswith(("token_embeddings.", "lm_head.")):
            weights[name] = adapters.with_rows(weights[name][:n_known], shape.padded_vocab_size)
    return weights


def base_of(options: config.Config) -> dict[str, Any]:
    """The base of a LoRA run: path of a checkpoint, SHA-256 of its weights, and the number of known tokens.

    A resumed run has the base recorded in its checkpoints, a new run the newest checkpoint of --init_from.
    """
    if options.train.parallel == "fsdp2":
        raise ValueError(
            "--train.parallel must be ddp, none or auto with --lora.rank, got fsdp2; adapters are not sharded"
        )
    if options.resume is not None:
        newest, _ = checkpoint.newest_valid(Path(options.resume) / run_dir.CHECKPOINTS)
        return checkpoint.read_about(newest).get("base", {}) if newest else {}
    if options.init_from is None:
        raise ValueError("--lora.rank needs --init_from, the run whose weights are adapted, got none")
    folder = options.init_from
    options = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    path = checkpoint.find(Path(folder) / run_dir.CHECKPOINTS)
    n_known = min(tokenizer_formats.load(Path(folder) / "tokenizer").vocab_size, options.model.vocab_size)
    return {"checkpoint": str(path), "sha256": checkpoint.weights_sha256(path), "vocab_size": n_known}


def adapt(
    model: models.TransformerLM, options: config.LoRAConfig, base: Mapping[str, Any]
) -> adapters.Trained:
    """Load the weights of `base` (`base_of`) into a plain model, and apply LoRA to it.

    Raises ValueError unless the checkpoint of the base exists, with unchanged weights.
    """
    with vocabulary.reading("a checkpoint of adapters must name its base"):
        path, expected, n_known = Path(base["checkpoint"]), str(base["sha256"]), int(base["vocab_size"])
    if (found := checkpoint.weights_sha256(path) if path.is_file() else "no such file") != expected:
        raise ValueError(
            f"{path} must have the base weights of these adapters, of SHA-256 {expected}, got {found}; put "
            "that checkpoint back, or fine-tune again from --init_from"
        )
    step = str(checkpoint.read_about(path)["step"])
    model.load_state_dict(initial_weights(path.parents[1], model.config, step))
    adapters.apply(model, options, n_known)
    return adapters.Trained(model, base)


def load_adapted(
    path: Path, options: config.Config, device: torch.device | str = "cpu"
) -> models.TransformerLM:
    """The model of a LoRA run at a checkpoint, with separate adapters and base weights."""
    model = models.TransformerLM(options.model, device=device)
    trained: Any = adapt(model, options.lora, checkpoint.read_about(path).get("base", {}))
    checkpoint.load_checkpoint(path, trained)
    return model


def load_run(
    folder: str | Path, device: torch.device | str = "cpu", which: str = "latest"
) -> tuple[models.TransformerLM, tokenizers.Tokenizer]:
    """Load the model of a run directory at checkpoint `which` (see `checkpoint.find`), and its tokenizer."""
    options = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    path = checkpoint.find(Path(folder) / run_dir.CHECKPOINTS, which)
    if options.lora.rank is not None:
        model = adapters.merged(load_adapted(path, options, device))
        return model, tokenizer_formats.load(Path(folder) / "tokenizer")
    # checked before the model is allocated; weights have four bytes each
    if (size := path.stat().st_size) < 4 * options.model.n_parameters:
        raise ValueError(
            f"{path} must hold the {options.model.n_parameters:,} weights of the model in "
            f"{folder}/config.json, got {size:,} bytes"
        )
    model = models.TransformerLM(options.model, device=device)
    checkpoint.load_checkpoint(path, model)
    return model, tokenizer_formats.load(Path(folder) / "tokenizer")


def open_run(
    options: commands.GenerateConfig | commands.ChatConfig,
) -> tuple[models.TransformerLM, tokenizers.Tokenizer]:
    """Enable the pieces of --mine and --fast, then load the model and tokenizer of `options`, quantized."""
    swap.use_for_command(options.mine, options.fast)
    process.tune_allocator()
    folder = run_dir.resolve(options.run_dir)
    model, tokenizer = load_run(folder, devices.choose(options.device), options.checkpoint)
    quantize_for_command(model, options)
    return model, tokenizer


def quantize_for_command(
    model: models.TransformerLM, options: generation_options.QuantizationOptions
) -> None:
    """Apply a command's options `--quantize` and `--kv_cache`; prints the memory to standard error."""
    quantized_model.quantize_(model, options.quantize, options.kv_cache)
    if options.quantize != "none" or options.kv_cache != "float32":
        print(f"memory    {quantized_model.describe(model)}", file=sys.stderr)
