"""Steering a run from the page. Alone: uv run --extra lab pytest tests/test_lab_steering.py"""

import json

import pytest

from llm_basics.runs import inbox, locks, run_dir, steering

pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from fastapi import testclient

from llm_basics.lab import app, catalog, service

TOKEN = "token-of-the-tests"


@pytest.fixture
def client(tmp_path):
    guarded = app.create(service.make(tmp_path), TOKEN, 8100)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    return testclient.TestClient(guarded, base_url="http://127.0.0.1:8100", headers=bearer)


@pytest.fixture
def folder(untrained_run):
    return untrained_run("one")


def steer(client, folder, **body):
    return client.post(f"/api/runs/{catalog.id_of(folder)}/steer", json=body)


def test_the_page_sends_the_command_that_steer_sends(client, folder):
    with locks.locked(folder):
        response = steer(client, folder, options={"train.lr": 1e-3, "train.eval_every": 50}, actions=["save"])
        assert response.status_code == 202
        steering.send(folder, *steering.parse(["train.lr=0.001", "train.eval_every=50", "save"]))
    first, second = map(json.loads, filter(str.strip, (folder / inbox.COMMANDS).read_text().splitlines()))
    assert first["id"] == response.json()["id"]
    assert {**first, "id": ""} == {**second, "id": ""}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"options": {"train.batch_size": 4}}, "cannot be changed while a run trains"),
        ({"options": {"data": "/etc/passwd"}}, "cannot be changed while a run trains"),
        ({"actions": ["explode"]}, "an action must be one of"),
        ({}, "must set an option"),
        ({"options": {"train.lr": [1]}}, "options.train.lr"),
        ({"options": {"train.lr": "x" * 101}}, "options.train.lr"),
        ({"run_dir": "x"}, "run_dir"),
    ],
    ids=str,
)
def test_what_may_not_be_requested_is_refused_with_its_reason(client, folder, body, reason):
    with locks.locked(folder):
        response = steer(client, folder, **body)
    assert response.status_code == 422 and reason in response.json()["detail"]
    assert not (folder / inbox.COMMANDS).exists()


def test_only_a_training_run_is_steered_and_only_by_whom_the_guard_lets_through(client, folder):
    assert steer(client, folder, actions=["save"]).status_code == 409
    with locks.locked(folder):
        client.headers["origin"] = "http://evil.example"
        assert steer(client, folder, actions=["save"]).status_code == 403
        client.headers.update({"origin": "http://127.0.0.1:8100", "authorization": ""})
        assert steer(client, folder, actions=["save"]).status_code == 401
    assert not (folder / inbox.COMMANDS).exists()


def test_a_training_run_obeys_the_page_and_records_it(client, tmp_path):
    from llm_basics.core import config
    from llm_basics.training import job, state

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    folder = tmp_path / "steered"
    options = config.Config(
        data=str(text),
        tokenizer="bytes",
        fast="off",
        data_dir=str(tmp_path / "data"),
        run_dir=str(folder),
        model=config.ModelConfig(vocab_size=257, context_length=16, d_model=16, n_layers=1, n_heads=2),
        train=config.TrainConfig(
            steps=6, batch_size=2, warmup_steps=0, log_every=1, sample_tokens=2, sample_every=0, device="cpu"
        ),
    )
    ids = []
    advance = state.TrainingState.advance

    def advance_and_steer(training):
        advance(training)
        if training.step in (2, 3):
            lr = 1e-4 if training.step == 2 else -1
            ids.append(steer(client, folder, options={"train.lr": lr}, actions=["sample"]).json()["id"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.TrainingState, "advance", advance_and_steer)
        assert job.main(options) == 0
    found = client.get(f"/api/runs/{catalog.id_of(folder)}/events").json()["records"]
    steered, refused = [event for event in found if event.get("id") in ids]
    assert (steered["step"], steered["event"], steered["do"]) == (2, "steered", ["sample"])
    assert steered["changed"]["train.lr"] == [3e-4, 1e-4]
    assert refused["event"] == "refused" and "lr" in refused["reason"]
    assert [sample["step"] for sample in run_dir.read_samples(folder)] == [2, 6]
    details = client.get(f"/api/runs/{catalog.id_of(folder)}").json()
    assert details["options"]["train.lr"] == 1e-4 and list(details["baselines"]) == ["unigram entropy"]


# --------------------------------------------------------------------------------------------------
# What went wrong, in words


def findings(client, folder):
    found = client.get(f"/api/runs/{catalog.id_of(folder)}/findings").json()
    return " | ".join(f"{each['sign']}: {each['cause']}" for each in found)


def test_a_run_that_is_starting_has_no_findings_and_one_that_ended_has(client, folder):
    with locks.locked(folder):
        assert findings(client, folder) == ""
    assert "ended before its first step" in findings(client, folder)


def test_spikes_steps_that_are_not_finite_and_a_failure_are_told_in_words(client, folder):
    with locks.locked(folder):
        (folder / run_dir.METRICS).write_text('{"step": 1, "train_loss": 5.6}\n')
        events = [
            {"step": 3, "event": "spike", "loss": 7.5, "z_score": 9},
            {"step": 5, "event": "spike", "loss": 9.25, "z_score": 20},
            {"step": 6, "event": "skipped", "reason": "the loss of step 6 is nan; first in layers.0"},
            {"step": 8, "event": "failed", "reason": "the loss of step 8 is nan"},
        ]
        (folder / run_dir.EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events))
        found = findings(client, folder)
    assert "2 loss spikes, the highest 9.25, step 5" in found
    assert "1 step not finite, the first is 6: the loss of step 6 is nan" in found
    assert "failed after step 8: the loss of step 8 is nan" in found


def test_a_loss_below_the_recorded_entropy_rate_is_a_leak(client, folder):
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(options | {run_dir.BASELINES: {"entropy rate": 2.0}}))
    lines = [json.dumps({"step": s, "train_loss": 5.5 - s / 2}) + "\n" for s in range(1, 11)]
    (folder / run_dir.METRICS).write_text("".join(lines))
    assert "below the entropy rate 2.000" in findings(client, folder)
