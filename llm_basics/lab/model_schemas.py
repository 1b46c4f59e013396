"""Requests to models, and responses specific to the server: the source of /openapi.json."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from llm_basics.lab import run_schemas

MAX_PROMPT_CHARACTERS = 100_000
MAX_PROMPT_TOKENS = 16_384
MAX_NEW_TOKENS = 4096
MAX_SAMPLES = 8

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_PROMPT_TOKENS)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Which = Annotated[str, Field(pattern=r"^(latest|best|[0-9]{1,12})$")]


class ModelRequest(run_schemas.Request):
    """A run and a checkpoint."""

    run: run_schemas.RunId
    checkpoint: Which = "latest"
    """latest, best, or a step."""


class TextRequest(ModelRequest):
    """A model and a text."""

    text: Text = ""
    ids: Ids | None = None
    """Token ids in place of `text`."""


class Sampling(run_schemas.Request):
    """Sampling options; see `llm-basics generate --help`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 200
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.8
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)] = []


class Message(run_schemas.Request):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Generate(Sampling, ModelRequest):
    """Generate text after a prompt, after token ids, or as a reply in a conversation."""

    prompt: Text = ""
    prompt_ids: Ids | None = None
    """Token ids in place of `prompt`."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)] | None = None
    """A conversation in place of `prompt`, for a chat model."""
    kept_ids: Ids = []
    """Token ids at the start of the response: to continue from an alternative, those before it and its id."""
    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    alternatives: Annotated[int, Field(ge=0, le=20)] = 4
    """Number of likely tokens to report beside each token."""


class MergesRequest(ModelRequest):
    """A range of merges."""

    first: Annotated[int, Field(ge=1)] = 1
    count: Annotated[int, Field(ge=1, le=1000)] = 200


class AttentionRequest(TextRequest):
    """Attention weights of a layer, for one head or all."""

    layer: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=0)] | None = None


class LensRequest(TextRequest):
    """The logit lens."""

    top: Annotated[int, Field(ge=1, le=20)] = 3


class NeighborsRequest(ModelRequest):
    """The tokens whose embeddings are closest to that of `id`."""

    id: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=1, le=100)] = 10


class Memory(pydantic.BaseModel):
    """Bytes of tensors at the peak of a training step, by kind."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors saved for the backward pass, and temporaries."""
    checkpoint: int
    """Copies written to a file."""
    total: int
    resident: int
    """Resident memory, including heap fragmentation."""
    free: int | None
    """Bytes currently available to a run; null if unknown."""
