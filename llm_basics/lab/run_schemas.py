"""Requests and responses about runs as pydantic models: the source of /openapi.json."""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from llm_basics.analysis import run_summary
from llm_basics.cli import overrides
from llm_basics.runs import metric_table

ID_PATTERN = r"^[0-9a-f]{12}$"
RunId = Annotated[str, Field(pattern=ID_PATTERN)]

State = Literal["starting", "training", "stopping", "paused", "stopped", "finished", "failed", "untrained"]


class Request(pydantic.BaseModel):
    """A request body; unknown fields and non-finite numbers are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class Health(pydantic.BaseModel):
    """Status of the server."""

    status: Literal["ok"] = "ok"
    version: str
    n_jobs: int
    """Requests in the queue of computations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary(run_summary.Summary):
    """A row in the list of runs."""

    id: str
    state: State
    can_resume: bool
    reason: str | None = None
    """The error of a failed run that was started by this server."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDetails(RunSummary, run_summary.Details):
    """Details of a run, without its metrics."""


class Verified(pydantic.BaseModel):
    """Whether the SHA-256 of a checkpoint matches."""

    step: int
    is_valid: bool
    error: str | None = None


class Metrics(pydantic.BaseModel):
    """Metrics of a run in buckets."""

    series: dict[str, metric_table.Buckets]
    names: list[str]
    """All metrics of the run."""
    first_step: int
    last_step: int
    is_complete: bool
    """False: a long file is still being read; repeat the request for the rest."""
    position: str
    """Start position of the live stream: `/api/stream?position=...`."""


class Records(pydantic.BaseModel):
    """Unmodified lines of samples.jsonl or events.jsonl, the oldest first."""

    records: list[dict[str, Any]]
    n_total: int


class Response(pydantic.BaseModel):
    """A response that a run of rl has sampled."""

    text: str
    reward: float | None
    advantage: float | None
    n_tokens: int | None
    is_exact: bool
    is_cut_off: bool


class RolloutGroup(pydantic.BaseModel):
    """A prompt with its responses."""

    prompt: str
    expected: str
    responses: list[Response]


class Rollouts(pydantic.BaseModel):
    """The responses of a step, from rollouts.jsonl."""

    steps: list[int]
    """All steps with responses."""
    step: int | None
    groups: list[RolloutGroup]
    is_whole: bool
    """False: the step has more responses than are listed."""
    is_complete: bool
    """False: a long file is still being read; ask again for more steps."""


class LogLines(pydantic.BaseModel):
    """The last lines of the log, and of the output of a process started by this server."""

    log: list[str]
    output: list[str]


class Finding(pydantic.BaseModel):
    """A sign of a mistake in the metrics, and its probable cause."""

    sign: str
    cause: str


class Preset(pydantic.BaseModel):
    """A preset of options."""

    name: str
    options: dict[str, Any]
    """The options that it sets, by their names on the command line."""
    parameters: int


class Presets(pydantic.BaseModel):
    """Presets, options and training texts for starting a run."""

    presets: list[Preset]
    options: list[overrides.Option]
    data: list[str]
    """Names of the server's training texts."""


class Start(Request):
    """Start a run."""

    preset: Annotated[str, Field(max_length=100)] = "tiny"
    options: Annotated[dict[str, Any], Field(max_length=100)] = {}
    """Overrides by name: `train.lr`. Options that name files cannot be set."""
    data: Annotated[str, Field(max_length=200)] = "stdlib"
    """One of the names in `Presets.data`."""
    name: Annotated[str, Field(max_length=100)] | None = None
    init_from: RunId | None = None
    """Warm start from the weights of this run."""


class Steer(Request):
    """Changes of options and actions, for a run while it trains."""

    options: Annotated[
        dict[str, int | float | Annotated[str, Field(max_length=100)] | None], Field(max_length=20)
    ] = {}
    """Values by option name, as in `train.lr`; the options are `runs.steering.STEERABLE`."""
    actions: Annotated[list[Annotated[str, Field(max_length=20)]], Field(max_length=10)] = []
    """`evaluate`, `sample`, `save`: once, after the step."""


class Rename(Request):
    """A new name for a run."""

    name: Annotated[str, Field(max_length=100)]


class Estimate(pydantic.BaseModel):
    """Size and cost of a model."""

    parameters: int
    parts: dict[str, int]
    """Number of parameters by component."""
    flops_per_token: int
    tokens: int
    """Total number of training tokens."""
    flops: float
    memory_bytes: int
    """Weights, gradients and AdamW's two means, without activations."""
    kv_cache_bytes: int
    """Keys and values of a full context, in float32."""
