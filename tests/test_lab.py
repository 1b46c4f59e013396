"""The server of the lab: runs, metrics, models. Alone: uv run --extra lab pytest tests/test_lab.py"""

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys

import lab_server
import pytest
import torch

from llm_basics.core import functional as F
from llm_basics.data import chat_template
from llm_basics.inference import engine
from llm_basics.runs import follow, locks, run_dir, tail

pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from fastapi import testclient

from llm_basics.lab import app, catalog, jobs, live, rollouts, run_routes, service

TOKEN = "token-of-the-tests"
BASE = "http://127.0.0.1:8100"


@pytest.fixture
def lab(tmp_path):
    return service.make(tmp_path)


@pytest.fixture
def client(lab):
    # a bearer is what a program sends
    return testclient.TestClient(
        app.create(lab, TOKEN, 8100), base_url=BASE, headers={"authorization": f"Bearer {TOKEN}"}
    )


@pytest.fixture
def run(untrained_run):
    """A run of some steps, and its id."""
    folder = untrained_run("one", specials=chat_template.SPECIALS)
    write_metrics(folder, [{"step": s, "train_loss": 5 - s / 10, "step_seconds": 0.5} for s in range(1, 9)])
    return catalog.id_of(folder)


def write_metrics(folder, entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries]
    (folder / run_dir.METRICS).write_text("".join(lines))


def events_of(response):
    """The server-sent events of a response: names and data."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


def get(client, path, **query):
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def post(client, path, **body):
    response = client.post(path, json=body)
    assert response.status_code < 300, response.text
    return response.json()


# --------------------------------------------------------------------------------------------------
# Runs


def test_the_list_has_the_newest_run_first(client, run, untrained_run):
    newer = untrained_run("two")
    os.utime(newer / "config.json", (2e9, 2e9))
    first, second = get(client, "/api/runs")
    assert (first["name"], first["state"], first["can_resume"]) == ("two", "untrained", False)
    assert second["id"] == run and second["state"] == "stopped" and second["can_resume"]
    assert second["step"] == 8 and second["steps"] == 1000 and second["train_loss"] == pytest.approx(4.2)
    assert second["sparkline"] == pytest.approx([5 - s / 10 for s in range(1, 9)])


def test_details_have_options_and_sizes(client, run):
    found = get(client, f"/api/runs/{run}")
    assert found["options"]["train.lr"] == 3e-4 and found["is_chat"]
    assert get(client, f"/api/runs/{run}/metrics")["names"] == ["train_loss", "step_seconds"]
    assert found["tokens_per_step"] == 16 * 64 and found["parameters"] > 1000


def test_only_options_that_differ_are_listed(client, run, untrained_run):
    other = untrained_run("two", context_length=32)
    found = get(client, "/api/diff", run=[run, catalog.id_of(other)])
    values = {each["option"]: each["values"] for each in found}
    assert values == {"model.context_length": [64, 32], "model.vocab_size": [261, 257]}


def test_a_run_is_renamed_and_deleted(client, run, tmp_path):
    moved = client.patch(f"/api/runs/{run}", json={"name": "better.1"})
    assert moved.status_code == 200 and moved.json()["id"] == catalog.id_of(tmp_path / "better.1")
    assert not (tmp_path / "one").exists() and not (tmp_path / "better.1" / "lock").exists()
    assert client.get(f"/api/runs/{run}").status_code == 404
    malformed = client.get("/api/runs/no-id")
    assert malformed.status_code == 404 and malformed.json()["detail"] == "there is no such run"
    assert client.delete(f"/api/runs/{moved.json()['id']}").status_code == 204
    assert get(client, "/api/runs") == [] and not (tmp_path / "better.1").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "newest", "a\nb", "x" * 101, "a\\b", "\u00e9"])
def test_a_new_name_is_plain(client, run, name, tmp_path):
    response = client.patch(f"/api/runs/{run}", json={"name": name})
    assert response.status_code == 422 and (tmp_path / "one").is_dir()
    assert client.post("/api/runs", json={"name": name or "/"}).status_code == 422


def test_a_training_run_is_not_changed(client, run, tmp_path):
    with locks.locked(tmp_path / "one"):
        assert get(client, f"/api/runs/{run}")["state"] == "training"
        for response in (
            client.delete(f"/api/runs/{run}"),
            client.patch(f"/api/runs/{run}", json={"name": "two"}),
            client.delete(f"/api/runs/{run}/checkpoints/0"),
            client.post(f"/api/runs/{run}/resume"),
        ):
            assert response.status_code == 409 and "training" in response.json()["detail"]
    assert locks.owner(tmp_path / "one") is None
    assert get(client, f"/api/runs/{run}")["state"] == "stopped"


def test_a_link_to_a_run_is_not_deleted(client, run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert client.delete(f"/api/runs/{catalog.id_of(tmp_path / 'link')}").status_code == 409
    assert (tmp_path / "one" / "config.json").exists()


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a\nb",
    "\u202eevil",
    "'\"&",
    "%2e%2e",
    os.fsdecode(b"\xff\xfe"),
    "a b",
]


HOSTILE_ROLLOUTS = [
    '{"step": 1, "attempt": 1, "group": [], "text": 3, "reward": NaN, "tokens": 5}\n',
    '{"step": 1, "attempt": 1, "text": "\\ud800<b>", "reward": true, "advantage": "1"}\n',
    '{"step": 1, "attempt": 1, broken\n[1]\n\0\n',
    '{"step": 1, "attempt": 1, "group": 0, "text": "torn',
]


def test_hostile_names_and_files_do_not_break_the_list(client, untrained_run, tmp_path):
    for name in HOSTILE:
        folder = untrained_run(name)
        lines = ['{"step": 1, "train_loss": NaN}\n', '{"step": 2, "train_loss": -Infinity}\n', "[1, 2]\n"]
        lines += ["[" * 100_000 + "\n", '{"step": -4}\n', '{"step": 1e400, "train_loss": 1}\n', "\0\n"]
        lines += ['{"step": 3, "train_loss": "4", "\\ud800": 1, "lr": {"a": []}}\n', '{"step": 4, "tra']
        write_metrics(folder, lines)
        (folder / run_dir.SAMPLES).write_text('{"text": "\\ud800<script>"}\n{"torn')
        (folder / run_dir.ROLLOUTS).write_text("".join(HOSTILE_ROLLOUTS))
    (tmp_path / "no config").mkdir()
    broken = untrained_run("broken")
    (broken / "config.json").write_text('{"train": {"steps": "x"}, "config": [], "model": 3}')
    assert len(get(client, "/api/runs")) == len(HOSTILE) + 1
    for id in (run["id"] for run in get(client, "/api/runs")):
        for path in ("", "/metrics", "/samples", "/events", "/log", "/checkpoints", "/findings", "/rollouts"):
            get(client, f"/api/runs/{id}{path}")
    found = get(client, f"/api/runs/{catalog.id_of(tmp_path / HOSTILE[0])}/metrics")
    assert found["series"]["train_loss"]["nonfinite"] == [1, 1, 0] and found["is_complete"]
    assert found["series"]["train_loss"]["last"] == [None, None, 4]
    found = get(client, f"/api/runs/{catalog.id_of(tmp_path / HOSTILE[0])}/rollouts")
    (group,) = found["groups"]
    texts = [(each["text"], each["reward"], each["advantage"]) for each in group["responses"]]
    assert found["steps"] == [1] and texts == [("", None, None), ("?<b>", None, None)]


# --------------------------------------------------------------------------------------------------
# Metrics


def test_seconds_are_those_of_training(client, run):
    series = get(client, f"/api/runs/{run}/metrics", name="train_loss")["series"]
    assert list(series) == ["train_loss"]
    assert series["train_loss"]["seconds"] == [0.5 * s for s in range(1, 9)]


# --------------------------------------------------------------------------------------------------
# The live stream


def test_the_stream_has_what_was_appended_since_its_position(client, lab, run, tmp_path):
    position = get(client, f"/api/runs/{run}/metrics")["position"]
    path = tmp_path / "one" / run_dir.METRICS
    with open(path, "a") as file:
        file.write('{"step": 9, "train_loss": NaN}\n{"step": 10, "tr')
    follower = live.Follower(lab.jobs, [run], position)
    first, row = follower.poll()
    assert first.name == "metrics" and first.data["records"] == [{"step": 9, "train_loss": None}]
    assert row.name == "run" and row.data["step"] == 9
    assert list(follower.poll()) == []
    with open(path, "a") as file:
        file.write('ain_loss": 1}\n')
    # another server goes on where this one was
    other = live.Follower(lab.jobs, [run], first.position)
    assert next(other.poll()).data["records"] == [{"step": 10, "train_loss": 1}]
    (tmp_path / "one" / run_dir.EVENTS).write_text('{"step": 3}\n')
    assert [each.name for each in follower.poll()] == ["metrics", "events", "run"]


def test_server_sent_events_go_on_after_the_last_event_id(lab, run):
    async def first(position, last_event_id):
        events = run_routes.stream(lab, [run], position, last_event_id)
        event = await anext(events)
        await events.aclose()
        return event

    # an EventSource that reconnects asks for the same address: its header is newer
    event = asyncio.run(first(f"{run}:9999:0:0", f"{run}:0:0:0"))
    assert event.event == "metrics" and len(json.loads(event.raw_data)["records"]) == 8
    event = asyncio.run(first(event.id, None))
    assert event.event == "run"


def test_a_client_far_behind_is_told_to_begin_again(lab, run, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "MAX_BEHIND_BYTES", 100)
    first, row = live.Follower(lab.jobs, [run], f"{run}:0:0:0").poll()
    assert (first.name, first.data) == ("reset", {"run": run, "of": "metrics"})
    follower = live.Follower(lab.jobs, [run], first.position)
    write_metrics(tmp_path / "one", [{"step": 1}])
    assert next(follower.poll()).name == "reset"


@pytest.mark.parametrize(
    "position", ["x", "::::", "a:1:2", f"{'0' * 12}:1:2:99999999999999999999", ";" * 4096]
)
def test_a_position_that_is_none_begins_at_the_end(lab, run, position):
    assert [event.name for event in live.Follower(lab.jobs, [run], position).poll()] == ["run"]


def test_the_stream_of_the_list_has_new_and_deleted_runs(lab, run, untrained_run):
    follower = live.Follower(lab.jobs, [])
    assert [event.data["id"] for event in follower.poll()] == [run]
    other = untrained_run("two")
    assert [event.data["name"] for event in follower.poll()] == ["two"]
    lab.runs.delete(catalog.id_of(other))
    assert [event.name for event in follower.poll()] == ["gone"]


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_rollouts_are_those_of_a_step_and_of_the_last_attempt(client, run, tmp_path):
    folder, path = tmp_path / "one", f"/api/runs/{run}/rollouts"
    assert get(client, path) == {
        "steps": [], "step": None, "groups": [], "is_whole": True, "is_complete": True
    }  # fmt: skip
    for step in (10, 20, 30):
        lab_server.write_rollouts(folder, step, [f"a{step}", f"b{step}"])
    found = get(client, path)
    assert (found["steps"], found["step"], len(found["groups"])) == ([10, 20, 30], 30, 2)
    group = get(client, path, step=20)["groups"][1]
    assert (group["prompt"], group["expected"]) == ("prompt 1", "4")
    assert group["responses"] == [
        {"text": "a20", "reward": 0, "advantage": -0.5, "n_tokens": 3, "is_exact": False, "is_cut_off": True},
        {"text": "b20", "reward": 1, "advantage": 0.5, "n_tokens": 3, "is_exact": True, "is_cut_off": False},
    ]
    # resumed from step 10: what came later is sampled again
    lab_server.write_rollouts(folder, 20, ["c20"], attempt=2)
    found = get(client, path)
    assert found["steps"] == [10, 20] and found["groups"][0]["responses"][0]["text"] == "c20"
    assert client.get(path, params={"step": 30}).status_code == 404
    assert client.get(path, params={"step": -1}).status_code == 422
    # a torn line is read when it is complete
    lab_server.write_rollouts(folder, 40, ["d40"], attempt=2, n_groups=1)
    content = (folder / run_dir.ROLLOUTS).read_bytes()
    (folder / run_dir.ROLLOUTS).write_bytes(content[:-20])
    assert get(client, path)["step"] == 20
    (folder / run_dir.ROLLOUTS).write_bytes(content)
    assert get(client, path)["groups"][0]["responses"][0]["text"] == "d40"
    # the file was replaced by a shorter one
    (folder / run_dir.ROLLOUTS).write_text("")
    assert get(client, path)["steps"] == []


def test_only_the_step_that_is_shown_is_parsed(client, lab, run, tmp_path, monkeypatch):
    for step in range(1, 40):
        lab_server.write_rollouts(tmp_path / "one", step, ["x" * 1000] * 4)
    size = (tmp_path / "one" / run_dir.ROLLOUTS).stat().st_size
    n_read = []
    read = tail.read
    monkeypatch.setattr(tail, "read", lambda *given: n_read.append(given[2]) or read(*given))
    found = get(client, f"/api/runs/{run}/rollouts", step=20)
    assert found["is_whole"] and sum(n_read) < size / 30
    # neither more of a step than allowed, nor more of a file at once
    monkeypatch.setattr(rollouts, "MAX_STEP_BYTES", 5000)
    found = get(client, f"/api/runs/{run}/rollouts", step=20)
    assert not found["is_whole"] and len(found["groups"][0]["responses"]) == 4 and n_read[-1] == 5000
    monkeypatch.setattr(tail, "MAX_BYTES", size // 2)
    other = rollouts.Index(tmp_path / "one" / run_dir.ROLLOUTS)
    other.update()
    assert not other.is_complete and len(other.steps) < 25
    other.update()
    other.update()
    assert other.is_complete and other.spans == lab.runs.rollouts(run).spans


def test_checkpoints_are_listed_verified_and_deleted(client, run, tmp_path):
    folder = tmp_path / "one" / run_dir.CHECKPOINTS
    (only,) = folder.iterdir()
    assert client.delete(f"/api/runs/{run}/checkpoints/0").status_code == 409
    (folder / "step_00000007.safetensors").write_bytes(only.read_bytes())
    newest, oldest = get(client, f"/api/runs/{run}/checkpoints")
    assert newest["is_latest"] and not oldest["is_latest"] and oldest["n_bytes"] == only.stat().st_size
    assert post(client, f"/api/runs/{run}/checkpoints/0/verify")["is_valid"]
    found = post(client, f"/api/runs/{run}/checkpoints/7/verify")
    assert not found["is_valid"] and "named after its step" in found["error"]
    # the newest is damaged: the valid one stays
    assert client.delete(f"/api/runs/{run}/checkpoints/0").status_code == 409
    assert client.delete(f"/api/runs/{run}/checkpoints/7").status_code == 204
    assert client.delete(f"/api/runs/{run}/checkpoints/7").status_code == 404
    assert only.exists()


# --------------------------------------------------------------------------------------------------
# Jobs


class Process:
    """Stands for a training process."""

    def __init__(self, arguments, **options):
        self.arguments, self.options, self.status, self.pid = arguments, options, None, 12345

    def poll(self):
        return self.status


@pytest.fixture
def processes(monkeypatch):
    started = []

    def start(*arguments, **options):
        started.append(Process(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    return started


def test_a_run_is_started_with_its_options(client, lab, processes, tmp_path):
    options = {"train.lr": 1e-2, "train.betas": [0.8, 0.9], "model.qk_norm": False, "train.min_lr": None}
    id = post(client, "/api/runs", preset="tiny", options=options, name="mine")["id"]
    (process,) = processes
    assert process.arguments[:3] == [sys.executable, "-m", "llm_basics.train"]
    assert process.arguments[3:] == [
        *("--config=tiny", "--data=stdlib", "--train.lr=0.01", "--train.betas", "0.8", "0.9"),
        *("--model.no-qk_norm", "--train.min_lr=None", f"--run_dir={tmp_path / 'mine'}"),
    ]
    assert process.options["start_new_session"] and process.options["stdin"] == subprocess.DEVNULL
    from llm_basics.cli import parse

    chosen = parse.train_options(process.arguments[3:])
    assert chosen.train.betas == (0.8, 0.9) and not chosen.model.qk_norm and chosen.train.min_lr is None
    assert [(each["id"], each["state"]) for each in get(client, "/api/runs")] == [(id, "starting")]
    assert client.post("/api/runs", json={"name": "mine"}).status_code == 409
    (tmp_path / ".lab" / "mine.log").write_text("error: no memory\n")
    process.status = 4
    (row,) = get(client, "/api/runs")
    assert row["state"] == "failed" and row["reason"] == "error: no memory"


@pytest.mark.parametrize(
    "body",
    [
        {"preset": "../tiny"},
        {"preset": "/etc/passwd"},
        {"data": "/etc/passwd"},
        {"options": {"mine": "evil.py"}},
        {"options": {"run_dir": "x"}},
        {"options": {"data": "x"}},
        {"options": {"resume": "x"}},
        {"options": {"tokenizer": "../x"}},
        {"options": {"train.lr": "a lot"}},
        {"options": {"train.lr": -1}},
        {"options": {"train.nothing": 1}},
        {"options": {"train.steps": 0}},
        {"options": {"model": {"d_model": 7}}},
        {"init_from": "../../x"},
        {"more": 1},
    ],
    ids=str,
)
def test_what_a_run_may_not_be_started_with(client, processes, body):
    assert client.post("/api/runs", json=body).status_code == 422 and not processes


def test_pause_and_stop_signal_the_process_that_holds_the_lock(client, run, tmp_path, monkeypatch):
    assert client.post(f"/api/runs/{run}/stop").status_code == 409
    sent = []
    monkeypatch.setattr(jobs.os, "kill", lambda pid, number: sent.append((pid, number)))
    with locks.locked(tmp_path / "one"):
        post(client, f"/api/runs/{run}/pause")
        assert get(client, f"/api/runs/{run}")["state"] == "stopping"
    assert (os.getpid(), signal.SIGUSR1) in sent
    assert get(client, f"/api/runs/{run}")["state"] == "paused"
    with locks.locked(tmp_path / "one"):
        post(client, f"/api/runs/{run}/stop")
    assert sent[-1][1] in (0, signal.SIGTERM) and (os.getpid(), signal.SIGTERM) in sent
    assert get(client, f"/api/runs/{run}")["state"] == "stopped"


def test_a_run_is_resumed(client, run, processes, tmp_path):
    post(client, f"/api/runs/{run}/resume")
    assert processes[0].arguments[3:] == [f"--resume={tmp_path / 'one'}"]
    assert get(client, f"/api/runs/{run}")["state"] == "starting"
    assert client.post(f"/api/runs/{run}/resume").status_code == 409


def test_presets_and_options_are_documented(client):
    found = get(client, "/api/presets")
    assert found["presets"][0]["name"] == "tiny" and found["data"] == ["stdlib"]
    assert all(option["help"] for option in found["options"])
    options = {option["name"]: option for option in found["options"]}
    assert options["train.lr"]["default"] == 3e-4 and options["train.betas"]["type"] == "tuple[float, float]"


def test_an_estimate_follows_the_options(client):
    small = post(client, "/api/estimate", options={"model.n_layers": 1})
    large = post(client, "/api/estimate", options={"model.n_layers": 2})
    assert small["parameters"] < large["parameters"] and large["memory_bytes"] == 16 * large["parameters"]


# --------------------------------------------------------------------------------------------------
# Models


def test_generated_text_is_that_of_generate(client, run, tmp_path):
    lm, chosen = engine.load_run(tmp_path / "one")
    body = {"run": run, "prompt": "ab", "max_new_tokens": 12, "seed": 3, "samples": 2, "top_k": 50}
    events = events_of(client.post("/api/generate", json=body | {"alternatives": 2}))
    for sample in (0, 1):
        expected = "".join(engine.complete(lm, chosen, "ab", 12, 0.8, 50, seed=3 + sample))
        mine = [data for _, data in events if data.get("sample") == sample]
        assert "".join(each["text"] for each in mine) == expected
        assert mine[-1]["reason"] == "length" and mine[-1]["n_new"] == 12 and mine[-1]["n_prompt"] == 2
    token = events[0][1]
    logits = lm(torch.tensor(chosen.encode("ab")))[-1].detach()
    assert token["probability"] == pytest.approx(float(F.softmax(logits)[token["id"]]), rel=1e-4)
    assert len(token["alternatives"]) == 2 and token["id"] not in [a["id"] for a in token["alternatives"]]
    assert events[-1] == ("end", {})


def test_generation_goes_on_from_an_alternative(client, run):
    body = {"run": run, "prompt": "ab", "max_new_tokens": 6, "temperature": 0}
    tokens = [data for name, data in events_of(client.post("/api/generate", json=body)) if name == "token"]
    ids = [97, 98, *(token["id"] for token in tokens[:2])]
    body = {"run": run, "prompt_ids": ids, "max_new_tokens": 4, "temperature": 0}
    rest = [data for name, data in events_of(client.post("/api/generate", json=body)) if name == "token"]
    assert [token["id"] for token in rest] == [token["id"] for token in tokens[2:]]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"prompt_ids": [99999]}, "vocabulary"),
        ({"prompt": "a", "prompt_ids": [1]}, "one of prompt"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "at most 63 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_is_an_error_event(client, run, more, reason):
    ((name, data),) = events_of(client.post("/api/generate", json={"run": run, **more}))
    assert name == "error" and reason in data["detail"]


@pytest.mark.parametrize(
    "more",
    [
        {"max_new_tokens": 10**6},
        {"temperature": -1},
        {"top_p": 0},
        {"samples": 99},
        {"prompt": "x" * 100_001},
        {"checkpoint": "../latest"},
        {"seed": 2**60},
        {"stop": [""]},
        {"prompt_ids": [-1]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_are_bounded(client, run, more):
    assert client.post("/api/generate", json={"run": run, "prompt": "a"} | more).status_code == 422


def test_tokens_of_a_text(client, run):
    found = post(client, "/api/tokenize", run=run, text="h\u00e9<|end|>")
    assert [t["id"] for t in found["tokens"]][:3] == [104, 0xC3, 0xA9] and found["n_bytes"] == 10
    assert found["tokens"][1]["token"] == "<c3>" and found["tokens"][-1]["is_special"]
    assert (found["tokens"][-1]["start"], found["tokens"][-1]["end"]) == (3, 10)


def test_merges_are_replayed(client, run, tmp_path):
    import small_models

    small_models.tokenizer().save(tmp_path / "one" / "tokenizer")
    (the, again) = post(client, "/api/merges", run=run, text="the the")["pretokens"]
    assert the["steps"] == [["t", "h", "e"], ["th", "e"], ["the"]] and the["ranks"] == [1, 2]
    assert again["steps"][-1] == [" the"]
    learned = post(client, "/api/merges/learned", run=run, first=2, count=2)
    assert [each["token"] for each in learned["merges"]] == ["the", " the"] and learned["n_total"] == 6
    assert client.post("/api/merges", json={"run": run, "text": "x" * 2001}).status_code == 422


def test_attention_weights_are_those_of_the_model(client, run, tmp_path):
    found = post(client, "/api/attention", run=run, text="abcd")
    lm, chosen = engine.load_run(tmp_path / "one")
    attn, x = lm.layers[0].attn, lm.token_embeddings(torch.tensor(chosen.encode("abcd")))
    q, k, _ = attn.project(lm.layers[0].ln1(x))
    q, k = (t.unflatten(-1, (2, -1)).transpose(0, 1) for t in (q, k))
    positions = torch.arange(4)
    scores = attn.rope(q, positions) @ attn.rope(k, positions).mT / math.sqrt(attn.d_head)
    scores = scores.masked_fill(~F.causal_mask(4, 4), -math.inf)
    for head in (0, 1):
        for query, row in enumerate(found["weights"][head]):
            assert len(row) == query + 1
            expected = torch.softmax(scores[head, query], -1)[: query + 1].tolist()
            assert row == pytest.approx(expected, abs=2e-5)
    one = post(client, "/api/attention", run=run, text="abcd", head=1)
    assert one["heads"] == [1] and one["weights"] == found["weights"][1:]
    for more in ({"layer": 1}, {"head": 2}, {"text": ""}, {"text": "x" * 65}):
        assert client.post("/api/attention", json={"run": run, "text": "ab", **more}).status_code == 422
    assert F.scaled_dot_product_attention.__module__ == "llm_basics.core.functional"


def test_the_last_layer_of_the_lens_is_the_output(client, run, tmp_path):
    found = post(client, "/api/lens", run=run, text="abc", top=2)
    lm, chosen = engine.load_run(tmp_path / "one")
    probabilities = F.softmax(lm(torch.tensor(chosen.encode("abc"))).detach())
    assert len(found["layers"]) == 2 and len(found["layers"][0]) == 3
    for cell, row, target in zip(found["layers"][-1], probabilities, (98, 99, None), strict=True):
        assert cell["top"][0]["id"] == int(row.argmax())
        assert cell["top"][0]["probability"] == pytest.approx(float(row.max()), rel=1e-4)
        assert cell["target_probability"] == (target and pytest.approx(float(row[target]), rel=1e-4))
        assert cell["entropy"] == pytest.approx(float(-(row * row.log()).sum()), rel=1e-3)


def test_norms_and_neighbors(client, run, tmp_path):
    outside, block = post(client, "/api/norms", run=run, text="abc")["layers"]
    lm, _ = engine.load_run(tmp_path / "one")
    expected = float(lm.lm_head.weight.detach().square().mean().sqrt())
    assert outside["weights"]["lm_head.weight"] == pytest.approx(expected, rel=1e-5)
    assert block["weights"]["attn.q_proj.weight"] > 0 and block["activation"] != outside["activation"]
    found = post(client, "/api/neighbors", run=run, id=97, count=3)["neighbors"]
    table = lm.token_embeddings.weight.detach()
    similar = torch.cosine_similarity(table, table[97][None]).topk(4)
    assert [each["id"] for each in found] == similar.indices.tolist()[1:]


def test_models_are_loaded_once_and_the_oldest_is_dropped(lab, untrained_run):
    ids = [catalog.id_of(untrained_run(name)) for name in "abcd"]
    first = lab.models.load(ids[0])
    assert lab.models.load(ids[0]) is first
    for id in ids[1:]:
        lab.models.load(id)
    assert lab.models.load(ids[0]) is not first


# --------------------------------------------------------------------------------------------------
# The queue


def test_a_full_queue_refuses(client, lab, run):
    import threading

    lab.worker.max_jobs = 1
    release = threading.Event()
    waiting = lab.worker.stream(iter([release.wait] and _wait(release)))
    response = client.post("/api/tokenize", json={"run": run, "text": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert client.post("/api/generate", json={"run": run}).status_code == 503
    release.set()
    assert list(waiting) == [1]
    post(client, "/api/tokenize", run=run, text="a")


def _wait(release):
    release.wait(20)
    yield 1


# --------------------------------------------------------------------------------------------------
# The page

PAGE_FILES = sorted(path.relative_to(app.STATIC).as_posix() for path in app.STATIC.rglob("*"))


@pytest.mark.parametrize("name", PAGE_FILES)
def test_a_file_of_the_page_has_its_type_and_nothing_inline_or_from_outside(client, name):
    response = client.get(f"/static/{name}")
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    policy = response.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy and "unsafe" not in policy
    text = response.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(
        r"https?:|[\"'(]//|@import|<style|\sstyle=|<script(?![^>]*\ssrc=)|\son\w+=\"|javascript:", text
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
    )


def test_modules_import_files_that_are_there_and_the_page_is_small(client):
    texts = {name: (app.STATIC / name).read_text("utf-8") for name in PAGE_FILES}
    imported = {name for text in texts.values() for name in re.findall(r"from \"\./([^\"]+)\"", text)}
    assert imported <= texts.keys() and client.get("/").text == texts["index.html"]
    assert {name for name in texts if name.endswith(".js")} == imported | {"main.js"}
    assert sum(text.count("\n") for text in texts.values()) < 3000
