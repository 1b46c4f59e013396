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

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics import checkpoint, config, device, presets, run, swap
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
    probabilities, ids = F.softmax(shifted / temperature).sort(descending=True, stable=True)
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
) -> Iterator[int]:
    """Continue `prompt` token by token, until `stop_id`, which is not given out, or `max_new_tokens`.

    Keys and values of earlier tokens are kept. Once the text is longer than the model's context, the last
    `context_length` tokens are read again for each new one.
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
                logits = model(tokens[:, caches[0].length :], caches=caches)
            else:
                logits = model(tokens[:, -context_length:])
            probabilities = next_token_probabilities(logits[0, -1], temperature, top_k, top_p)
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
) -> list[list[int]]:
    """Continue several texts at once: for each what `generate` gives, drawn with its own generator.

    From the end of the shortest prompt on, all texts go one token a step: a longer prompt goes on with its
    own. So they are equally long at every step, and need neither padding nor a mask. Who is done leaves.
    Best for prompts of similar lengths: what the longest has more than the shortest is read singly.
    """
    if not all(prompt.numel() for prompt in prompts):
        raise ValueError("each prompt must have at least one token, got one with none")
    texts = [prompt.tolist() for prompt in prompts]

    def is_over(i: int) -> bool:
        n_new = len(texts[i]) - len(prompts[i])
        return n_new == max_new_tokens or (n_new > 0 and texts[i][-1] == stop_id)

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
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p).cpu()
            for row, i in enumerate(going_on):
                if len(texts[i]) == length:
                    generator = generators[i] if generators is not None else None
                    texts[i].append(int(torch.multinomial(probabilities[row], 1, generator=generator)))
            length += 1
            rows = [row for row, i in enumerate(going_on) if not is_over(i)]
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


def stream_text(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` as it comes. A character of several tokens is held back until it is whole.

    >>> list(stream_text(tokenizers.Tokenizer.of_bytes(), [72, 0xC3, 0xA9, 33]))
    ['H', '\\xe9', '!']
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        if text := decoder.decode(tokenizer.decode_bytes([id])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def complete(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continue the text `prompt` to the end of the document; an empty one begins a new document."""
    end = tokenizer.special_id(tokenizers.END_OF_TEXT)
    ids = tokenizer.encode_ordinary(prompt) or [end]
    tokens = torch.tensor(ids, device=model.lm_head.weight.device)
    generator = torch.Generator().manual_seed(seed)
    new = generate(model, tokens, max_new_tokens, temperature, top_k, top_p, stop_id=end, generator=generator)
    return stream_text(tokenizer, new)


# --------------------------------------------------------------------------------------------------


def load_run(
    folder: str | Path, place: torch.device | str = "cpu", which: str = "latest"
) -> tuple[models.TransformerLM, tokenizers.Tokenizer]:
    """The model of a run directory at its checkpoint `which` (`checkpoint.find`), and its tokenizer."""
    options = presets.update(config.Config(), run.read_config(folder), origin=f"{folder}/config.json")
    model = models.TransformerLM(options.model, device=place)
    checkpoint.load_checkpoint(checkpoint.find(Path(folder) / run.CHECKPOINTS, which), model)
    return model, tokenizers.Tokenizer.load(Path(folder) / "tokenizer")


def main(options: programs.GenerateConfig) -> int:
    """Write as `options` say. Returns the exit status."""
    with command_line.exit_on_mistake():
        if options.mine is not None:
            swap.use(options.mine)
            print(f"pieces    {swap.explain()}", file=sys.stderr)
        if options.fast == "on":
            swap.use("fast", say=lambda line: print(line, file=sys.stderr))
        folder = run.newest_folder() if options.run_dir == "newest" else Path(options.run_dir)
        model, tokenizer = load_run(folder, device.choose(options.device), options.checkpoint)
    try:
        for sample in range(options.samples):
            print(options.prompt, end="")
            for text in complete(
                model,
                tokenizer,
                options.prompt,
                options.max_new_tokens,
                options.temperature,
                options.top_k,
                options.top_p,
                options.seed + sample,
            ):
                print(text, end="", flush=True)
            print()
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model may write any character
    sys.exit(main(OPTIONS))
