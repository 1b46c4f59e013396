"""Text generation with the probability of each token, and likely alternatives."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.analysis import inspection
from llm_basics.core import functional as F
from llm_basics.core import generate
from llm_basics.data import chat_template
from llm_basics.inference import detokenizer, engine
from llm_basics.lab import model_schemas


@dataclasses.dataclass(frozen=True)
class Token(inspection.Alternative):
    """A generated token; `text` has the characters that it completes."""

    sample: int
    index: int
    text: str
    alternatives: list[inspection.Alternative]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a sample: at the end of the text or a stop string, or at the maximum length."""

    sample: int
    reason: str
    """stop or length."""
    text: str
    """Remaining buffered text."""
    n_prompt: int
    n_new: int


def prompt_ids(loaded: inspection.LoadedModel, request: model_schemas.Generate) -> list[int]:
    """The ids of the prompt of a request, without `kept_ids`."""
    given = [request.prompt_ids is not None, request.messages is not None, bool(request.prompt)]
    if sum(given) > 1:
        raise ValueError("give one of prompt, prompt_ids and messages, got more than one")
    if request.messages is not None:
        messages = [chat_template.Message(m.role, m.content) for m in request.messages]
        ids = chat_template.render_prompt(loaded.tokenizer, messages)
        longest = loaded.lm.config.context_length - 1
        if len(ids) > longest:
            raise ValueError(f"a conversation must have at most {longest} tokens, got {len(ids)}")
        return ids
    if request.prompt_ids:
        return loaded.check(request.prompt_ids)
    ids = loaded.tokenizer.encode_ordinary(request.prompt) or [loaded.tokenizer.end_of_text_id]
    if len(ids) > model_schemas.MAX_PROMPT_TOKENS:
        raise ValueError(
            f"a prompt must have at most {model_schemas.MAX_PROMPT_TOKENS:,} tokens, got {len(ids):,}"
        )
    return ids


def samples(loaded: inspection.LoadedModel, request: model_schemas.Generate) -> Iterator[Token | Finished]:
    """Generate the samples of a request, interleaved token by token."""
    ids = prompt_ids(loaded, request)
    active = [_sample(loaded, request, ids, number) for number in range(request.samples)]
    try:
        while active:
            for each in list(active):
                try:
                    yield next(each)
                except StopIteration:
                    active.remove(each)
    finally:
        for each in active:
            each.close()


def _sample(
    loaded: inspection.LoadedModel, request: model_schemas.Generate, ids: list[int], number: int
) -> Generator[Token | Finished, None, None]:
    lm, tokenizer = loaded.lm, loaded.tokenizer
    is_chat = request.messages is not None
    latest: list[Tensor] = []
    adjust = engine.make_logits_processor(request.temperature, request.min_p, request.repetition_penalty)
    stop_id = tokenizer.special_id(chat_template.END) if is_chat else tokenizer.end_of_text_id
    others = [tokenizer.special_id(s) for s in tokenizer.special_tokens] if is_chat else []
    forbidden = torch.tensor([id for id in others if id != stop_id], dtype=torch.long)

    def record(so_far: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        latest[:] = [F.softmax(logits.detach().float()).cpu()]
        # as in `chat`: no special token in a reply, and the penalty does not apply to the prompt
        if is_chat:
            logits = logits.index_fill(0, forbidden.to(logits.device), -torch.inf)
            so_far = so_far[len(ids) :]
        return logits if adjust is None else adjust(so_far, logits)

    kept = loaded.check(request.kept_ids)
    most = request.max_new_tokens
    if is_chat:
        most = max(0, min(most, lm.config.context_length - len(ids) - len(kept)))
    stream = detokenizer.Detokenizer(tokenizer, request.stop)
    for id in kept:
        stream.read(id)
    new = generate.generate(
        lm,
        loaded.tensor([*ids, *kept]),
        most,
        request.temperature,
        request.top_k,
        request.top_p,
        stop_id=stop_id,
        generator=torch.Generator().manual_seed(request.seed + number),
        adjust=record,
    )
    n_new = 0
    with contextlib.closing(new):  # type: ignore[type-var]
        for id in new:
            text = stream.read(id)
            yield _token(loaded, latest[0], id, request.alternatives, number, n_new, text)
            n_new += 1
            if stream.is_over:
                break
    reason = "stop" if stream.is_over or n_new < most else "length"
    yield Finished(number, reason, stream.close(), len(ids) + len(kept), n_new)


def _token(
    loaded: inspection.LoadedModel,
    probabilities: Float[Tensor, " vocab"],
    id: int,
    n_alternatives: int,
    sample: int,
    index: int,
    text: str,
) -> Token:
    others = [each for each in loaded.likely(probabilities, n_alternatives + 1) if each.id != id]
    return Token(
        id=id,
        token=loaded.show(id),
        probability=float(probabilities[id]),
        sample=sample,
        index=index,
        text=text,
        alternatives=others[:n_alternatives],
    )
