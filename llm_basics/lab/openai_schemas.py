"""The supported part of OpenAI's API as pydantic models. Unknown fields are ignored."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from llm_basics.lab import model_schemas

Stop = Annotated[str, Field(max_length=200)] | Annotated[list[str], Field(max_length=16)] | None
Prompts = (
    model_schemas.Text
    | model_schemas.Ids
    | Annotated[list[model_schemas.Text], Field(max_length=model_schemas.MAX_SAMPLES)]
    | Annotated[list[model_schemas.Ids], Field(max_length=model_schemas.MAX_SAMPLES)]
)


class StreamOptions(pydantic.BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class CreateRequest(pydantic.BaseModel):
    """Common fields of completions and chat completions; min_p, top_k and repetition_penalty are ours."""

    model_config = pydantic.ConfigDict(allow_inf_nan=False)

    model: Annotated[str, Field(max_length=300)]
    """Name or id of a run, with `@best` or `@STEP` for a checkpoint other than the latest."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=model_schemas.MAX_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1, le=model_schemas.MAX_NEW_TOKENS)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0


class Completion(CreateRequest):
    """Body of /v1/completions."""

    prompt: Prompts = ""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class Part(pydantic.BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: model_schemas.Text


class ChatMessage(pydantic.BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: model_schemas.Text | Annotated[list[Part], Field(max_length=100)]

    def to_message(self) -> model_schemas.Message:
        """The message in the format of our requests."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return model_schemas.Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatCompletion(CreateRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=200)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=model_schemas.MAX_NEW_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
