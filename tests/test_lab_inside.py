"""The lab: norms, gradients, memory, the course. Alone: uv run --extra lab pytest tests/test_lab_inside.py"""

import json

import pytest

from llm_basics.analysis import inspection, norms
from llm_basics.cli import overrides
from llm_basics.core import trainer
from llm_basics.data import chat_template
from llm_basics.inference import engine
from llm_basics.learn import lessons, progress
from llm_basics.training import memory

pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from fastapi import testclient

from llm_basics.lab import app, catalog, service

RIGHT = "import torch\n\ndef silu(x):\n    return x * torch.sigmoid(x)\n"


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RIGHT)
    return path


@pytest.fixture
def client(tmp_path, mine):
    lab = service.make(tmp_path / "runs", mine=str(mine))
    token = "token-of-the-tests"
    return testclient.TestClient(
        app.create(lab, token, 8100),
        base_url="http://127.0.0.1:8100",
        headers={"authorization": f"Bearer {token}"},
    )


@pytest.fixture
def run(untrained_run):
    return untrained_run("runs/one", specials=chat_template.SPECIALS)


def post(client, path, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(client, **body):
    lines = client.post("/api/generate", json=body).text.splitlines()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert not any("detail" in each for each in data), data
    return [each for each in data if "token" in each]


# --------------------------------------------------------------------------------------------------
# Inside


def test_norms_and_gradients_are_those_of_the_model(client, run):
    loaded = inspection.LoadedModel(*engine.load_run(run))
    loaded.lm.eval().requires_grad_(False)
    ids, id = list(b"abc"), catalog.id_of(run)
    found = post(client, "/api/norms", run=id, text="abc")["layers"]
    assert found == [vars(each) for each in norms.norms(loaded, ids).layers]
    found = post(client, "/api/gradients", run=id, ids=ids)
    expected = norms.gradients(loaded, ids)
    assert found["total"] == expected.total and found["loss"] == expected.loss
    assert found["layers"] == [vars(each) for each in expected.layers]
    for path in ("/api/norms", "/api/gradients"):
        assert client.post(path, json={"run": id, "text": "x" * 65}).status_code == 422
    assert client.post("/api/gradients", json={"run": id, "text": "x"}).status_code == 422


def test_memory_is_the_estimate_of_training(client):
    options = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "train.device": "cpu"}
    found = post(client, "/api/memory", options=options)
    estimate = client.post("/api/estimate", json={"options": options}).json()
    assert estimate["parameters"] == sum(estimate["parts"].values())
    chosen = overrides.resolve("tiny", options)
    expected = memory.estimate(chosen, trainer.make_optimizer, trainer.batch_loss)
    assert {kind: found[kind] for kind in expected.kinds} == expected.kinds
    assert found["total"] == expected.total and (found["free"] is None or found["free"] > 0)
    for wrong, reason in (
        ({"model.n_heads": 3, "model.d_model": 64}, "divisible"),
        ({"model.n_layers": 10**6}, "at most 64 layers"),
        ({"train.batch_size": 10**9}, "tokens in a batch"),
    ):
        refused = client.post("/api/memory", json={"options": wrong})
        assert refused.status_code == 422 and reason in refused.json()["detail"]


# --------------------------------------------------------------------------------------------------
# Generation that goes on


@pytest.mark.parametrize("given", [{"prompt": "ab"}, {"messages": [{"role": "user", "content": "ab"}]}])
def test_kept_tokens_begin_the_answer(client, run, given):
    body = {"run": catalog.id_of(run), "temperature": 0, "repetition_penalty": 1.3, **given}
    whole = tokens(client, max_new_tokens=6, **body)
    rest = tokens(client, max_new_tokens=4, kept_ids=[each["id"] for each in whole[:2]], **body)
    assert [each["id"] for each in rest] == [each["id"] for each in whole[2:]]


def test_a_kept_id_is_in_the_vocabulary_and_leaves_room(client, run):
    id = catalog.id_of(run)
    response = client.post("/api/generate", json={"run": id, "prompt": "a", "kept_ids": [99999]})
    assert "vocabulary" in response.text
    body = {"run": id, "messages": [{"role": "user", "content": "x" * 30}]}
    assert len(tokens(client, kept_ids=[97] * 20, max_new_tokens=50, temperature=0, **body)) <= 64 - 33 - 20
    assert tokens(client, kept_ids=[97] * 60, **body) == []


# --------------------------------------------------------------------------------------------------
# The course


def test_steps_have_their_state_and_the_last_message(client, mine):
    known = progress.Progress(mine)
    known.note("silu", "failed", "silu: numbers around 0\n  mistake: SIGMOID ALONE")
    known.hints["silu"] = 2
    known.save()
    found = client.get("/api/learn").json()
    steps = {step["name"]: step for step in found["steps"]}
    assert found["mine"] == str(mine) and list(steps) == lessons.ORDER
    courses = {
        course: [name for name in steps if steps[name]["course"] == course] for course in lessons.COURSES
    }
    assert courses == lessons.COURSES
    assert steps["silu"]["status"] == "failed" and "SIGMOID" in steps["silu"]["message"]
    assert steps["silu"]["is_current"] and "hint silu" in found["next"]
    assert steps["linear"]["status"] == "not started" and steps["linear"]["message"] == ""
    mine.write_text(RIGHT.replace("x * ", "2 * x * "))
    assert not client.get("/api/learn").json()["steps"][4]["is_current"]
    page = client.get("/api/learn/lessons/silu").json()
    assert page["hints"] == lessons.load("silu").hints[:2] and page["idea"]
    for missing in ("nothing", "..%2F..%2Fmine"):
        assert client.get(f"/api/learn/lessons/{missing}").status_code == 404
    (mine.with_suffix(".progress.json")).write_text("{}")
    response = client.get("/api/learn")
    assert response.status_code == 422 and "delete it" in response.json()["detail"]


def test_a_learner_s_run_races_the_newest_reference_with_the_same_options(client, untrained_run):
    own, reference, other = (untrained_run(f"runs/{name}") for name in ("own", "reference", "other"))
    for folder, change in ((own, {"mine": "mine.py"}), (other, {"data": "book.txt"})):
        path = folder / "config.json"
        options = json.loads(path.read_text()) | change
        if folder == own:
            options["origins"] = {"functional.silu": "mine.py (0123456789ab)"}
        path.write_text(json.dumps(options))
    assert client.get("/api/learn/races").json() == [
        {"yours": catalog.id_of(own), "reference": catalog.id_of(reference)}
    ]
    (reference / "config.json").unlink()
    assert client.get("/api/learn/races").json() == [{"yours": catalog.id_of(own), "reference": None}]
