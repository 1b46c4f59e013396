"""The application: a page, and an API over run directories for the page and other programs.

**Access.** Every path except `/`, `/static/*`, `/api/health` and `/openapi.json` needs the token: the cookie
set by `GET /?token=TOKEN`, or `Authorization: Bearer TOKEN`. A browser sends `Origin` with all requests that
change or compute; it must be this server. Bodies are JSON, 1 MiB at most. Errors are `{"detail": TEXT}` with
a readable text; below `/v1` `{"error": {"message": TEXT}}`. 401 no token, 403 wrong origin, 404 missing, 409
conflict with the state (training, name taken, last valid checkpoint), 413 too long, 422 invalid field, 503
queue full (`Retry-After`), 507 disk. A run is identified by its `id` (12 hex digits, a hash of its name), a
checkpoint by `latest`, `best` or its step. Non-finite numbers are null.

**Runs** (fields: `run_schemas`, `analysis/run_summary.py`, `analysis/metric_table.py`)

    GET    /api/health                        status, version, n_jobs
    GET    /api/runs                          [RunSummary], newest first: id name state can_resume config step
                                              steps train_loss val_loss best_val_loss tokens_per_second
                                              eta_seconds updated sparkline reason has_checkpoint
                                              has_metrics
           state: starting training stopping paused stopped finished failed untrained
    POST   /api/runs                          {preset options: {"train.lr": 1e-3} data name init_from}: {id}
    GET    /api/runs/ID                       RunDetails: and folder is_chat options origins parameters
                                              flops_per_token tokens_per_step baselines training_tokens normal
    PATCH  /api/runs/ID                       {name}: {id}, which is new
    DELETE /api/runs/ID
    POST   /api/runs/ID/pause|resume|stop     202; the state changes when the process has saved
    POST   /api/runs/ID/steer                 {options: {"train.lr": 1e-3}, actions: ["sample"]}: 202, {id} of
                                              the event `steered` or `refused` (with its `reason`)
    GET    /api/runs/ID/metrics               ?name=train_loss&name=val_loss&first=0&last=1000&buckets=500:
                                              {series: {NAME: {first_step last_step min max mean last count
                                              nonfinite seconds}}, names, first_step, last_step, is_complete,
                                              position}; is_complete false: repeat the request
    GET    /api/runs/ID/samples|events        ?skip=0&limit=200: {records, n_total}
    GET    /api/runs/ID/rollouts              ?step=40: {steps, step, groups: [{prompt expected responses:
                                              [{text reward advantage n_tokens is_exact is_cut_off}]}],
                                              is_whole, is_complete}; without `step` the last one
    GET    /api/runs/ID/log                   ?lines=200: {log, output}
    GET    /api/runs/ID/findings              [{sign, cause}]
    GET    /api/runs/ID/checkpoints           [{step val_loss n_bytes time is_latest is_best error}]
    POST   /api/runs/ID/checkpoints/STEP/verify   {step, is_valid, error}
    DELETE /api/runs/ID/checkpoints/STEP
    GET    /api/diff                          ?run=ID&run=ID: [{option, values}]
    GET    /api/presets                       {presets: [{name, options, parameters}], options: [{name, type,
                                              default, help}], data}
    GET    /api/terms                         {TERM: one line}: options, metrics and others
    POST   /api/estimate                      as POST /api/runs: {parameters parts flops_per_token tokens
                                              flops memory_bytes kv_cache_bytes}

**Live** `GET /api/stream?run=ID&run=ID&position=P`, server-sent events: `metrics`, `samples`, `events` with
{run, records} (unmodified lines of the file; a line of metrics with `resumed` replaces all later steps),
`run` with a changed RunSummary, `gone` {run}, and `reset` {run, of}: too many changes, fetch the metrics
again. `position` is that of the metrics response, so that no events are lost; an EventSource resumes by
`Last-Event-ID`. Without `run`: changes of the whole list.

**Models** (fields: `model_schemas`, `generation`, `analysis/inspection.py`, `analysis/tokenization.py`);
every body but that of /memory has `run` and `checkpoint`

    POST   /api/generate          prompt | prompt_ids | messages, kept_ids max_new_tokens temperature top_k
                                  top_p min_p repetition_penalty seed stop samples alternatives; events:
                                  `token` {sample index id token text probability alternatives: [{id token
                                  probability}]}, `finished` {sample reason text n_prompt n_new}, `end`,
                                  `error` {detail}. To continue from an alternative: kept_ids.
    POST   /api/tokenize          text: {tokens: [{id token start end is_special}], n_bytes, vocab_size}
    POST   /api/merges            text: {pretokens: [{text, steps, ranks}]}
    POST   /api/merges/learned    first, count: {merges: [{rank left right token id}], n_total}
    POST   /api/attention         text | ids, layer, head: {tokens ids layer n_layers n_heads heads weights}
    POST   /api/lens              text | ids, top: {tokens, ids, layers: [[{top, entropy,
                                  target_probability}]]}
    POST   /api/norms             text | ids: {layers: [{layer, weights, attention, ffn, activation}]}
    POST   /api/gradients         text | ids: {loss, total, layers: [{layer, weights, total, activation}]}
    POST   /api/neighbors         id, count: {token, neighbors: [{id token similarity}]}
    POST   /api/memory            as POST /api/runs: {parameters gradients optimizer activations total free}

**Learn** (the file of pieces is that of `--mine`)

    GET    /api/learn                 {mine, steps: [{name title status is_current message}], next}
    GET    /api/learn/lessons/STEP    {name title pieces optional idea formula shapes paper later hints}
    GET    /api/learn/races           [{yours, reference}], ids of runs

**OpenAI** `GET /v1/models`, `POST /v1/completions`, `POST /v1/chat/completions`, streaming or not; the model
is the name of a run, `NAME@best` or `NAME@STEP`, the API key is the token.
"""

import importlib.metadata
import mimetypes
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from llm_basics.core import files
from llm_basics.inference import worker
from llm_basics.lab import (
    catalog,
    learn_routes,
    model_routes,
    openai_routes,
    run_routes,
    run_schemas,
    security,
    service,
)

STATIC = Path(__file__).parent / "static"

STATUS: dict[type[Exception], int] = {
    catalog.Missing: 404,
    catalog.Conflict: 409,
    worker.Busy: 503,
    TimeoutError: 503,
    files.WriteError: 507,
    ValueError: 422,
}


def create(lab: service.Lab, token: str, port: int, hosts: tuple[str, ...] = ()) -> security.Guard:
    """The application, wrapped by its guard."""
    app = FastAPI(title="llm_basics lab", version=version(), docs_url=None, redoc_url=None)
    app.state.lab = lab
    for router in (run_routes.router, model_routes.router, learn_routes.router, openai_routes.router):
        app.include_router(router)
    for error in STATUS:
        app.add_exception_handler(error, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/api/health", health, methods=["GET"], tags=["runs"])
    app.add_api_route("/static/{name:path}", static, methods=["GET"], include_in_schema=False)
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    return security.Guard(app, token, port, hosts)


def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("llm_basics")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def health(request: Request) -> run_schemas.Health:
    """The status of the server."""
    return run_schemas.Health(version=version(), n_jobs=service.of(request).worker.n_jobs)


def page() -> Response:
    """The page."""
    return static("index.html")


def static(name: str) -> Response:
    """A file of the page, by its name in a fixed list: request text is never used as a path."""
    found = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}
    if name not in found:
        return JSONResponse({"detail": "there is no such file"}, 404)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(found[name].read_bytes(), media_type="text/javascript" if name.endswith(".js") else kind)


# --------------------------------------------------------------------------------------------------
# Errors


async def _failed(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return _error(request, status, str(error))


async def _invalid(request: Request, error: Any) -> Response:
    """Describe an invalid field in one line, without its value."""
    if any(each["loc"] == ("path", "id") for each in error.errors()):
        return _error(request, 404, "there is no such run")  # no run has such an id
    found = [
        f"{'.'.join(str(part) for part in each['loc'][1:]) or 'the body'}: {each['msg']}"
        for each in error.errors()[:5]
    ]
    return _error(request, 422, "; ".join(found))


def _error(request: Request, status: int, message: str) -> Response:
    headers = {"retry-after": "5"} if status == 503 else None
    text = message.encode("utf-8", "replace").decode("utf-8")
    if request.url.path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(openai_routes.error_body(text, kind), status, headers)
    return JSONResponse({"detail": text}, status, headers)
