"""Routes of runs: list, details, metrics, live stream, checkpoints; start, pause, resume, stop."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from llm_basics.analysis import norms, run_summary, terms
from llm_basics.cli import nested, overrides
from llm_basics.core import config, presets
from llm_basics.lab import catalog, live, rollouts, run_schemas, service
from llm_basics.learn import log_checks
from llm_basics.runs import checkpoint, follow, run_dir, tail

router = APIRouter(prefix="/api", tags=["runs"])

# polling interval of the files in seconds
POLL_SECONDS = 0.8

Lab = Annotated[service.Lab, Depends(service.of)]
Id = Annotated[str, Path(pattern=run_schemas.ID_PATTERN)]
Ids = Annotated[list[Annotated[str, Query(pattern=run_schemas.ID_PATTERN)]], Query(max_length=live.MAX_RUNS)]
Step = Annotated[int, Path(ge=0, lt=10**12)]
Skip = Annotated[int, Query(ge=0)]
Count = Annotated[int, Query(ge=1, le=5000)]


@router.get("/runs")
def list_runs(lab: Lab) -> list[run_schemas.RunSummary]:
    """All runs, the newest first."""
    return lab.jobs.summaries()


@router.post("/runs", status_code=201)
def start_run(request: run_schemas.Start, lab: Lab) -> dict[str, str]:
    """Start a run in a new process; `id` is that of the run in the list."""
    return {"id": lab.jobs.start(request)}


@router.get("/runs/{id}")
def get_run(id: Id, lab: Lab) -> run_schemas.RunDetails:
    """Details of a run."""
    return run_schemas.RunDetails(
        **vars(lab.jobs.summary(id)), **vars(run_summary.details(lab.runs.folder(id)))
    )


@router.patch("/runs/{id}")
def rename_run(id: Id, request: run_schemas.Rename, lab: Lab) -> dict[str, str]:
    """Rename a run that is not training; `id` is its new id."""
    lab.jobs.forget(id)
    return {"id": lab.runs.rename(id, request.name)}


@router.delete("/runs/{id}", status_code=204)
def delete_run(id: Id, lab: Lab) -> None:
    """Delete a run that is not training, with all its files."""
    lab.jobs.forget(id)
    lab.runs.delete(id)


@router.post("/runs/{id}/pause", status_code=202)
def pause_run(id: Id, lab: Lab) -> dict[str, str]:
    """Save and stop; a resumed run is bitwise equal to an uninterrupted one."""
    lab.jobs.stop(id, pauses=True)
    return {"id": id}


@router.post("/runs/{id}/resume", status_code=202)
def resume_run(id: Id, lab: Lab) -> dict[str, str]:
    """Resume from the newest checkpoint."""
    lab.jobs.resume(id)
    return {"id": id}


@router.post("/runs/{id}/stop", status_code=202)
def stop_run(id: Id, lab: Lab) -> dict[str, str]:
    """Save and stop."""
    lab.jobs.stop(id)
    return {"id": id}


@router.post("/runs/{id}/steer", status_code=202)
def steer_run(id: Id, request: run_schemas.Steer, lab: Lab) -> dict[str, str]:
    """Request changes from a training run; `id` is that of the resulting event `steered` or `refused`."""
    return {"id": lab.jobs.steer(id, request)}


@router.get("/diff")
def diff(run: Ids, lab: Lab) -> list[run_summary.Difference]:
    """The options that differ between runs."""
    return run_summary.differences([lab.runs.folder(id) for id in run])


# --------------------------------------------------------------------------------------------------
# Metrics


@router.get("/runs/{id}/metrics")
def get_metrics(
    id: Id,
    lab: Lab,
    name: Annotated[list[str], Query(max_length=64)] = [],  # noqa: B006
    first: Annotated[int, Query(ge=0, le=tail.MAX_EXACT)] = 0,
    last: Annotated[int, Query(ge=0, le=tail.MAX_EXACT)] = tail.MAX_EXACT,
    buckets: Annotated[int, Query(ge=1, le=4000)] = 500,
) -> run_schemas.Metrics:
    """Metrics in buckets; without `name` all of them."""
    table = lab.runs.table(id)
    with table.lock:
        table.update()
        names = [each for each in (name or table.names) if each in table.names]
        found = {tail.clean(each): table.buckets(each, first, last, buckets) for each in names}
        position = (table.offset, *live.end_of(lab.runs, id)[1:])
        return run_schemas.Metrics(
            series=found,
            names=[tail.clean(each) for each in table.names],
            first_step=int(table.steps[0]) if table.n_rows else 0,
            last_step=int(table.steps[-1]) if table.n_rows else 0,
            is_complete=table.is_complete,
            position=follow.format({id: position}),
        )


@router.get("/stream", response_class=EventSourceResponse)
async def stream(
    lab: Lab,
    run: Ids = [],  # noqa: B006
    position: Annotated[str | None, Query(max_length=4096)] = None,
    last_event_id: Annotated[str | None, Header(max_length=4096)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Live events of runs, only changes; without `run`, changes of the list of runs."""
    follower = await run_in_threadpool(live.Follower, lab.jobs, run, last_event_id or position)
    while not lab.is_closing.is_set():
        for event in await run_in_threadpool(lambda: list(follower.poll())):
            yield ServerSentEvent(raw_data=json.dumps(event.data), event=event.name, id=event.position)
        await asyncio.sleep(POLL_SECONDS)


@router.get("/runs/{id}/samples")
def get_samples(id: Id, lab: Lab, skip: Skip = 0, limit: Count = 200) -> run_schemas.Records:
    """Texts sampled during training."""
    records, n_total = tail.records(lab.runs.folder(id) / run_dir.SAMPLES, skip, limit)
    return run_schemas.Records(records=records, n_total=n_total)


@router.get("/runs/{id}/events")
def get_events(id: Id, lab: Lab, skip: Skip = 0, limit: Count = 200) -> run_schemas.Records:
    """Events by step."""
    records, n_total = tail.records(lab.runs.folder(id) / run_dir.EVENTS, skip, limit)
    return run_schemas.Records(records=records, n_total=n_total)


@router.get("/runs/{id}/rollouts")
def get_rollouts(id: Id, lab: Lab, step: Annotated[int | None, Query(ge=0)] = None) -> run_schemas.Rollouts:
    """Responses that a run of rl has sampled in a step, by prompt; without `step`, in the last one."""
    index = lab.runs.rollouts(id)
    with index.lock:
        index.update()
        steps, is_complete = index.steps, index.is_complete
        chosen = steps[-1] if step is None and steps else step
        if step is not None and step not in index.spans:
            raise catalog.Missing(f"the run has no rollouts of step {step}")
        records, is_whole = index.read(chosen) if chosen is not None else ([], True)
    return run_schemas.Rollouts(
        steps=steps,
        step=chosen,
        groups=rollouts.grouped(records),
        is_whole=is_whole,
        is_complete=is_complete,
    )


@router.get("/runs/{id}/log")
def get_log(id: Id, lab: Lab, lines: Count = 200) -> run_schemas.LogLines:
    """The end of the log, and of the output of the process."""
    folder = lab.runs.folders().get(id)
    log = tail.last_lines(folder / "log.txt", lines) if folder is not None else []
    return run_schemas.LogLines(log=log, output=lab.jobs.output(id, lines))


@router.get("/runs/{id}/findings")
def get_findings(id: Id, lab: Lab) -> list[run_schemas.Finding]:
    """Signs of mistakes in the metrics, as text."""
    found = log_checks.of_run(lab.runs.folder(id))
    return [run_schemas.Finding(sign=sign, cause=cause) for sign, cause in found]


# --------------------------------------------------------------------------------------------------
# Checkpoints and presets


@router.get("/runs/{id}/checkpoints")
def list_checkpoints(id: Id, lab: Lab) -> list[run_summary.Checkpoint]:
    """The checkpoints of a run, the newest first."""
    return run_summary.checkpoints(lab.runs.folder(id))


@router.post("/runs/{id}/checkpoints/{step}/verify")
def verify_checkpoint(id: Id, step: Step, lab: Lab) -> run_schemas.Verified:
    """Verify the SHA-256 of a checkpoint."""
    path = lab.runs.checkpoint(id, str(step))

    def verify() -> run_schemas.Verified:
        try:
            checkpoint.verify(path)
            return run_schemas.Verified(step=step, is_valid=True)
        except ValueError as error:
            return run_schemas.Verified(step=step, is_valid=False, error=str(error))

    return lab.worker.call(verify)


@router.delete("/runs/{id}/checkpoints/{step}", status_code=204)
def delete_checkpoint(id: Id, step: Step, lab: Lab) -> None:
    """Delete a checkpoint of a run that is not training, except the last valid one."""
    lab.runs.delete_checkpoint(id, step)


@router.get("/presets")
def list_presets(lab: Lab) -> run_schemas.Presets:
    """Presets, options with their documentation, and training texts."""
    found = []
    for name in overrides.preset_names():
        chosen = nested.flat(presets.read_yaml(name))
        chosen.pop("config")
        parameters = presets.load(name).model.n_parameters
        found.append(run_schemas.Preset(name=name, options=chosen, parameters=parameters))
    return run_schemas.Presets(presets=found, options=overrides.all_options(), data=list(lab.jobs.data))


@router.get("/terms")
def list_terms() -> dict[str, str]:
    """Definitions of terms in one line: options, metrics and others."""
    return terms.known()


@router.post("/estimate")
def estimate(request: run_schemas.Start) -> run_schemas.Estimate:
    """Size and cost of a run for the body of `POST /api/runs`."""
    options: config.Config = overrides.resolve(request.preset, request.options)
    shape, train = options.model, options.train
    tokens = train.steps * train.batch_size * train.grad_accumulation_steps * shape.context_length
    return run_schemas.Estimate(
        parameters=shape.n_parameters,
        parts=norms.parameters_by_part(shape),
        flops_per_token=shape.flops_per_token,
        tokens=tokens,
        flops=float(tokens) * shape.flops_per_token,
        memory_bytes=16 * shape.n_parameters,
        kv_cache_bytes=8 * shape.n_layers * shape.context_length * shape.d_kv,
    )
