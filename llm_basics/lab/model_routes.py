"""Routes of models: generate, tokenize, inspect, estimate memory. All computations run in the queue."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from fastapi.sse import EventSourceResponse, format_sse_event

from llm_basics.analysis import inspection, tokenization
from llm_basics.analysis import norms as layer_norms
from llm_basics.cli import overrides
from llm_basics.core import device, trainer
from llm_basics.lab import generation, model_schemas, run_schemas, service
from llm_basics.training import memory as memory_estimate

T = TypeVar("T")

# limits of memory estimates, which take a minute for that many layers
MAX_LAYERS, MAX_PARAMETERS, MAX_TOKENS = 64, 10**12, 10**9

router = APIRouter(prefix="/api", tags=["models"])

Lab = Annotated[service.Lab, Depends(service.of)]


@router.post("/generate", response_model=None)
def generate(request: model_schemas.Generate, lab: Lab) -> Any:
    """Server-sent events: `token`, `finished` for each sample, then `end` or `error`."""
    return EventSourceResponse(_events(_start(request, lab)))


def _start(request: model_schemas.Generate, lab: service.Lab) -> Iterator[Any]:
    lab.runs.checkpoint(request.run, request.checkpoint)

    def work() -> Iterator[Any]:
        yield from generation.samples(lab.models.load(request.run, request.checkpoint), request)

    return lab.worker.stream(work())


def _events(items: Iterator[Any]) -> Iterator[bytes]:
    try:
        for item in items:
            name = "token" if isinstance(item, generation.Token) else "finished"
            yield format_sse_event(event=name, data_str=json.dumps(dataclasses.asdict(item)))
        yield format_sse_event(event="end", data_str="{}")
    except (ValueError, TimeoutError) as error:
        yield format_sse_event(event="error", data_str=json.dumps({"detail": str(error)}))


@router.post("/tokenize")
def tokenize(request: model_schemas.TextRequest, lab: Lab) -> tokenization.Tokenized:
    """The tokens of a text."""
    return _compute(lab, request, lambda loaded: tokenization.tokenize(loaded, request.text, request.ids))


@router.post("/merges")
def merges(request: model_schemas.TextRequest, lab: Lab) -> tokenization.Merges:
    """The merges of a text, step by step."""
    return _compute(lab, request, lambda loaded: tokenization.merges(loaded, request.text))


@router.post("/merges/learned")
def learned_merges(request: model_schemas.MergesRequest, lab: Lab) -> tokenization.LearnedMerges:
    """The merges of the tokenizer in the order of learning."""
    return _compute(
        lab, request, lambda loaded: tokenization.learned_merges(loaded, request.first, request.count)
    )


@router.post("/attention")
def attention(request: model_schemas.AttentionRequest, lab: Lab) -> inspection.Attention:
    """Attention weights of a layer."""
    return _compute(
        lab,
        request,
        lambda loaded: inspection.attention(loaded, _ids(loaded, request), request.layer, request.head),
    )


@router.post("/lens")
def lens(request: model_schemas.LensRequest, lab: Lab) -> inspection.Lens:
    """The logit lens."""
    return _compute(lab, request, lambda loaded: inspection.lens(loaded, _ids(loaded, request), request.top))


@router.post("/norms")
def norms(request: model_schemas.TextRequest, lab: Lab) -> layer_norms.Norms:
    """Root mean squares of weights and activations by layer."""
    return _compute(lab, request, lambda loaded: layer_norms.norms(loaded, _ids(loaded, request)))


@router.post("/gradients")
def gradients(request: model_schemas.TextRequest, lab: Lab) -> layer_norms.Gradients:
    """Norms of the gradients of the loss of a text by layer."""
    return _compute(lab, request, lambda loaded: layer_norms.gradients(loaded, _ids(loaded, request)))


@router.post("/neighbors")
def neighbors(request: model_schemas.NeighborsRequest, lab: Lab) -> inspection.Neighbors:
    """Tokens with similar embeddings."""
    return _compute(lab, request, lambda loaded: inspection.neighbors(loaded, request.id, request.count))


@router.post("/memory")
def memory(request: run_schemas.Start, lab: Lab) -> model_schemas.Memory:
    """Memory of a training step for the body of `POST /api/runs`; takes seconds for a large model."""
    options = overrides.resolve(request.preset, request.options)
    model, n_tokens = options.model, options.train.batch_size * options.model.context_length
    if model.n_layers > MAX_LAYERS or model.n_parameters > MAX_PARAMETERS or n_tokens > MAX_TOKENS:
        raise ValueError(
            f"an estimate is made for at most {MAX_LAYERS} layers, {MAX_PARAMETERS:,} parameters and "
            f"{MAX_TOKENS:,} tokens in a batch, got {model.n_layers}, {model.n_parameters:,} and {n_tokens:,}"
        )

    def compute() -> model_schemas.Memory:
        found = memory_estimate.estimate(options, trainer.make_optimizer, trainer.batch_loss)
        free = memory_estimate.available(device.choose(options.train.device))
        return model_schemas.Memory(**found.kinds, total=found.total, resident=found.resident, free=free)

    return lab.worker.call(compute)


def _compute(
    lab: service.Lab, request: model_schemas.ModelRequest, compute: Callable[[inspection.LoadedModel], T]
) -> T:
    return lab.with_model(request.run, request.checkpoint, compute)


def _ids(loaded: inspection.LoadedModel, request: model_schemas.TextRequest) -> list[int]:
    return loaded.encode(request.text, request.ids)
