"""OpenAI-compatible routes: /v1/models, /v1/completions and /v1/chat/completions, streaming or not."""

import json
import math
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.sse import EventSourceResponse, format_sse_event

from llm_basics.analysis import inspection
from llm_basics.lab import catalog, generation, model_schemas, openai_schemas, service

router = APIRouter(prefix="/v1", tags=["openai"])

# as in OpenAI's reference
COMPLETION_TOKENS = 16
CHAT_TOKENS = 512

Lab = Annotated[service.Lab, Depends(service.of)]


@router.get("/models")
def list_models(lab: Lab) -> dict[str, Any]:
    """The runs that have a checkpoint."""
    runs = [run for run in lab.jobs.summaries() if run.state != "starting"]
    return {"object": "list", "data": [_model(run.name, run.updated) for run in runs if _has(lab, run.id)]}


@router.get("/models/{name}")
def get_model(name: str, lab: Lab) -> dict[str, Any]:
    """A run that has a checkpoint."""
    id, which = _find(lab, name)
    return _model(name, lab.runs.checkpoint(id, which).stat().st_mtime)


@router.post("/completions", response_model=None)
def create_completion(request: openai_schemas.Completion, lab: Lab) -> Any:
    """Continue one prompt or several."""
    prompts: list[Any] = [request.prompt]
    if isinstance(request.prompt, list) and not (request.prompt and isinstance(request.prompt[0], int)):
        prompts = list(request.prompt) or [""]
    alternatives = request.logprobs or 0
    requests = []
    for prompt in prompts:
        given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
        requests.append(_request(lab, request, COMPLETION_TOKENS, alternatives, **given))
    return _respond(_Completion(lab, request, requests))


@router.post("/chat/completions", response_model=None)
def create_chat_completion(request: openai_schemas.ChatCompletion, lab: Lab) -> Any:
    """Reply in a conversation."""
    messages = [message.to_message() for message in request.messages]
    most = request.max_completion_tokens or CHAT_TOKENS
    chosen = _request(lab, request, most, request.top_logprobs or 0, messages=messages)
    return _respond(_ChatCompletion(lab, request, [chosen]))


def _has(lab: service.Lab, id: str) -> bool:
    try:
        lab.runs.checkpoint(id, "latest")
    except catalog.Missing:
        return False
    return True


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "llm_basics"}


def _find(lab: service.Lab, model: str) -> tuple[str, str]:
    """The run and the checkpoint of `NAME`, `NAME@best` or `NAME@STEP`."""
    name, _, which = model.rpartition("@")
    if name and (which in ("latest", "best") or which.isdecimal()):
        return lab.runs.named(name), which
    return lab.runs.named(model), "latest"


def _request(
    lab: service.Lab, request: openai_schemas.CreateRequest, most: int, alternatives: int, **given: Any
) -> model_schemas.Generate:
    id, which = _find(lab, request.model)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return model_schemas.Generate(
        run=id,
        checkpoint=which,
        max_new_tokens=request.max_tokens or most,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed % 2**53,
        stop=stop or [],
        samples=request.n or 1,
        alternatives=alternatives,
        **given,
    )


def _respond(answer: "_Completion") -> Any:
    items = answer.start()
    if answer.request.stream:
        return EventSourceResponse(answer.stream(items))
    return answer.complete(items)


class _Completion:
    """Builds the response to /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        lab: service.Lab,
        request: Any,
        requests: list[model_schemas.Generate],
    ) -> None:
        self.lab, self.request, self.requests = lab, request, requests
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.n_prompt = self.n_new = 0

    def start(self) -> Iterator[tuple[int, Any]]:
        """Queue the requests; yields the index of the choice, and a token or its end."""
        first = self.requests[0]
        # raises before the response starts
        self.lab.runs.checkpoint(first.run, first.checkpoint)

        def work() -> Iterator[tuple[int, Any]]:
            loaded = self.lab.models.load(first.run, first.checkpoint)
            prompts = [generation.prompt_ids(loaded, request) for request in self.requests]
            self.n_prompt = sum(map(len, prompts))
            yield 0, None
            for number, request in enumerate(self.requests):
                if getattr(self.request, "echo", None):
                    for sample in range(request.samples):
                        yield number * request.samples + sample, loaded.tokenizer.decode(prompts[number])
                for item in generation.samples(loaded, request):
                    self.n_new += isinstance(item, generation.Token)
                    yield number * request.samples + item.sample, item

        items = self.lab.worker.stream(work())
        next(items)  # errors in a prompt are raised here, as a response with a status
        return items

    # -- answers ----------------------------------------------------------------------------------

    def complete(self, items: Iterator[tuple[int, Any]]) -> dict[str, Any]:
        """The complete response."""
        n_choices = sum(request.samples for request in self.requests)
        texts = ["" for _ in range(n_choices)]
        tokens: list[list[generation.Token]] = [[] for _ in range(n_choices)]
        reasons = ["length" for _ in range(n_choices)]
        for index, item in items:
            texts[index] += item if isinstance(item, str) else item.text
            if isinstance(item, generation.Token):
                tokens[index].append(item)
            elif isinstance(item, generation.Finished):
                reasons[index] = item.reason
        choices = [
            self.choice(index, texts[index], tokens[index], reasons[index]) for index in range(n_choices)
        ]
        return self._answer(self.kind, choices) | {"usage": self.usage}

    def stream(self, items: Iterator[tuple[int, Any]]) -> Iterator[bytes]:
        """The response as a stream of tokens."""
        options = self.request.stream_options
        try:
            for index, item in items:
                reason = item.reason if isinstance(item, generation.Finished) else None
                text = item if isinstance(item, str) else item.text
                tokens = [item] if isinstance(item, generation.Token) else []
                yield self._chunk([self.delta(index, text, tokens, reason)])
            if options is not None and options.include_usage:
                yield self._chunk([], usage=self.usage)
        except (ValueError, TimeoutError) as error:
            yield format_sse_event(data_str=json.dumps(error_body(str(error), "server_error")))
        yield format_sse_event(data_str="[DONE]")

    def choice(
        self, index: int, text: str, tokens: list[generation.Token], reason: str | None
    ) -> dict[str, Any]:
        """A choice of the whole answer."""
        return {
            "index": index,
            "text": text,
            "finish_reason": reason,
            "logprobs": self.logprobs(tokens) if self.request.logprobs is not None else None,
        }

    delta = choice

    def logprobs(self, tokens: list[generation.Token]) -> dict[str, Any]:
        """Log-probabilities in the format of /v1/completions."""
        offsets, end = [], 0
        for token in tokens:
            offsets.append(end)
            end += len(token.text)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_log(token.probability) for token in tokens],
            "top_logprobs": [
                {each.token: _log(each.probability) for each in (token, *token.alternatives)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        total = self.n_prompt + self.n_new
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_new,
            "total_tokens": total,
        }

    def _answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return format_sse_event(data_str=json.dumps(self._answer(self.chunk_kind, choices) | more))


class _ChatCompletion(_Completion):
    """Builds the response to /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(
        self, index: int, text: str, tokens: list[generation.Token], reason: str | None
    ) -> dict[str, Any]:
        """A choice of the whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": reason,
            "logprobs": self.logprobs(tokens) if self.request.logprobs else None,
        }

    def delta(
        self, index: int, text: str, tokens: list[generation.Token], reason: str | None
    ) -> dict[str, Any]:
        """A choice of a chunk."""
        found = self.choice(index, text, tokens, reason)
        message = found.pop("message")
        return found | {"delta": {name: message[name] for name in ("role", "content")}}

    def logprobs(self, tokens: list[generation.Token]) -> dict[str, Any]:
        """Log-probabilities in the format of /v1/chat/completions."""

        def entry(each: inspection.Alternative) -> dict[str, Any]:
            content = list(each.token.encode())
            return {"token": each.token, "logprob": _log(each.probability), "bytes": content}

        n = self.request.top_logprobs or 0
        content = []
        for token in tokens:
            top = sorted((token, *token.alternatives), key=lambda each: -each.probability)[:n]
            content.append(entry(token) | {"top_logprobs": [entry(each) for each in top]})
        return {"content": content, "refusal": None}


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error in the format of OpenAI's API."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -9999.0
