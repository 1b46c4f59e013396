"""Let a trained model write.

uv run python -m llm_basics.generate runs/NAME --prompt "def "
"""

import sys

from llm_basics import command_line, programs

if __name__ == "__main__":
    # before torch is loaded, which takes seconds: --help and mistakes answer at once
    OPTIONS = command_line.program_options(
        programs.GenerateConfig(), sys.argv[1:], prog="python -m llm_basics.generate"
    )
    command_line.spin_less()

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics import adjusting, checkpoint, config, exchange, presets, run, streaming
from llm_basics import functional as F
from llm_basics import model as models
from llm_basics import tokenizer as tokenizers

# --------------------------------------------------------------------------------------------------
# Choosing the next token


def next_token_probabilities(
    logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "... vocab"]:
    """The distribution to draw the next token from.

    `temperature` divides the logits: below 1 the likely become likelier, at 0 only the likeliest is left.
    `top_k` keeps the k likeliest tokens. `top_p` keeps the likeliest that together reach the probability p,
    the one that crosses it included (nucleus sampling, arXiv 1904.09751). Of equals, lower ids go first.

    >>> next_token_probabilities(torch.tensor([0.5, 0.2, 0.3]).log(), top_p=0.6)
    tensor([0.6250, 0.0000, 0.3750])
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        temperature, top_k = 1.0, 1
    shifted = logits.float() - logits.float().amax(
        -1, keepdim=True
    )  # a tiny temperature keeps the maximum at 0
    probabilities = F.softmax(shifted / temperature)
    if top_k is None and top_p is None:
        return probabilities
    probabilities, ids = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
    if top_p is not None:
        total = probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p * total] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)


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
    adjust: adjusting.Adjust | None = None,
) -> Iterator[int]:
    """Continue `prompt` token by token, until `stop_id`, which is not given out, or `max_new_tokens`.

    Keys and values of earlier tokens are kept. Once the text is longer than the model's context, the last
    `context_length` tokens are read again for each new one. `adjust` is given all ids and the scores of the
    next one, and what it makes of these is drawn from.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt must have at least one token, got none")
    was_training = model.training
    model.eval()
    context_length = model.config.context_length
    tokens = prompt[None]
    caches = model.new_caches(batch=1)
    try:
        for _ in range(max_new_tokens):
            if tokens.shape[-1] <= context_length:
                logits = model(tokens[:, caches[0].length :], caches=caches)[0, -1]
            else:
                logits = model(tokens[:, -context_length:])[0, -1]
            if adjust is not None:
                logits = adjust(tokens[0], logits)
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            # drawn on the CPU, where a seed means the same on every machine
            token = torch.multinomial(probabilities.cpu(), 1, generator=generator)
            if token.item() == stop_id:
                return
            tokens = torch.cat([tokens, token[None].to(tokens.device)], dim=-1)
            yield int(token.item())
    finally:
        model.train(was_training)


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
    adjust: adjusting.Adjust | None = None,
    ends_with: Callable[[int, int], bool] = lambda i, token: False,
) -> list[list[int]]:
    """Continue several texts at once: for each what `generate` gives, drawn with its own generator.

    From the end of the shortest prompt on, all texts go one token a step: a longer prompt goes on with its
    own. So they are equally long at every step, and need neither padding nor a mask. Who is done leaves.
    Best for prompts of similar lengths: what the longest has more than the shortest is read singly.
    `ends_with` is told the number of a text and its new token, and says whether that is the last.
    """
    if not all(prompt.numel() for prompt in prompts):
        raise ValueError("each prompt must have at least one token, got one with none")
    texts = [prompt.tolist() for prompt in prompts]

    ended: set[int] = set()

    going_on = list(range(len(texts))) if max_new_tokens else []
    length = min(map(len, texts), default=0)
    context_length, place = model.config.context_length, model.lm_head.weight.device
    was_training = model.training
    model.eval()
    caches = model.new_caches(batch=len(texts))
    try:
        while going_on:
            is_cached = length <= context_length
            first = caches[0].length if is_cached else length - context_length
            tokens = torch.tensor([texts[i][first:length] for i in going_on], device=place)
            logits = model(tokens, caches=caches if is_cached else None)[:, -1]
            if adjust is not None:
                so_far = [torch.tensor(texts[i][:length], device=place) for i in going_on]
                logits = torch.stack([adjust(ids, row) for ids, row in zip(so_far, logits, strict=True)])
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p).cpu()
            for row, i in enumerate(going_on):
                if len(texts[i]) == length:
                    generator = generators[i] if generators is not None else None
                    token = int(torch.multinomial(probabilities[row], 1, generator=generator))
                    texts[i].append(token)
                    n_new = len(texts[i]) - len(prompts[i])
                    if token == stop_id or ends_with(i, token) or n_new == max_new_tokens:
                        ended.add(i)
            length += 1
            rows = [row for row, i in enumerate(going_on) if i not in ended]
            if len(rows) < len(going_on):
                going_on = [going_on[row] for row in rows]
                for cache in caches:
                    cache.keep(torch.tensor(rows, dtype=torch.long, device=place))
    finally:
        model.train(was_training)
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [text[:-1] if text and text[-1] == stop_id else text for text in new]


# --------------------------------------------------------------------------------------------------
# From tokens to text


def prompt_tokens(
    model: models.TransformerLM, tokenizer: tokenizers.Tokenizer, prompt: str
) -> Int[Tensor, " seq"]:
    """The ids of the text `prompt`, where the model is; an empty one begins a new document."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.special_id(tokenizers.END_OF_TEXT)]
    return torch.tensor(ids, device=model.lm_head.weight.device)


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
    adjust: adjusting.Adjust | None = None,
) -> Iterator[str]:
    """Continue the text `prompt` to the end of the document, or to the first of the strings `stops`."""
    new = generate(
        model,
        prompt_tokens(model, tokenizer, prompt),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        stop_id=tokenizer.special_id(tokenizers.END_OF_TEXT),
        generator=torch.Generator().manual_seed(seed),
        adjust=adjust,
    )
    return streaming.stream_text(tokenizer, new, stops)


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
    adjust: adjusting.Adjust | None = None,
) -> list[str]:
    """Continue several texts at once: for each what `complete` gives with its own seed."""
    streams = [streaming.TextStream(tokenizer, stops) for _ in prompts]
    texts = ["" for _ in prompts]

    def ends_with(i: int, token: int) -> bool:
        texts[i] += streams[i].read(token)
        return streams[i].is_over

    generate_batch(
        model,
        [prompt_tokens(model, tokenizer, prompt) for prompt in prompts],
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        stop_id=tokenizer.special_id(tokenizers.END_OF_TEXT),
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        adjust=adjust,
        ends_with=ends_with,
    )
    return [text + stream.close() for text, stream in zip(texts, streams, strict=True)]


# --------------------------------------------------------------------------------------------------


def load_run(
    folder: str | Path, place: torch.device | str = "cpu", which: str = "latest"
) -> tuple[models.TransformerLM, tokenizers.Tokenizer]:
    """The model of a run directory at its checkpoint `which` (`checkpoint.find`), and its tokenizer."""
    options = presets.update(config.Config(), run.read_config(folder), origin=f"{folder}/config.json")
    model = models.TransformerLM(options.model, device=place)
    checkpoint.load_checkpoint(checkpoint.find(Path(folder) / run.CHECKPOINTS, which), model)
    return model, exchange.load(Path(folder) / "tokenizer")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model may write any character
    # the program uses what stands on the floors above this one
    sys.exit(importlib.import_module("llm_basics.generate_cli").main(OPTIONS))
