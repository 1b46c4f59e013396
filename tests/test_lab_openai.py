"""OpenAI's client against the lab's server. Alone: uv run --extra lab pytest tests/test_lab_openai.py"""

import pytest

from llm_basics.data import chat_template
from llm_basics.inference import engine

pytest.importorskip("fastapi", reason="needs uv sync --extra lab")
pytest.importorskip("openai", reason="needs OpenAI's client")

import openai
from fastapi import testclient

from llm_basics.lab import app, catalog, service

TOKEN = "token-of-the-tests"


@pytest.fixture
def client(tmp_path, untrained_run):
    untrained_run("chat", specials=chat_template.SPECIALS)
    untrained_run("plain")
    base = "http://127.0.0.1:8100"
    transport = testclient.TestClient(app.create(service.make(tmp_path), TOKEN, 8100), base_url=base)
    return openai.OpenAI(api_key=TOKEN, base_url=f"{base}/v1", http_client=transport, max_retries=0)


def expected(tmp_path, prompt, n, seed):
    lm, chosen = engine.load_run(tmp_path / "plain")
    return "".join(engine.complete(lm, chosen, prompt, n, 1.0, seed=seed))


def test_models(client, tmp_path):
    assert {model.id for model in client.models.list()} == {"chat", "plain"}
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError, match="no run"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no checkpoint 7"):
        client.completions.create(model="plain@7", prompt="a")
    for name in ("plain@0", catalog.id_of(tmp_path / "plain")):
        assert client.completions.create(model=name, prompt="a", max_tokens=1).choices


def test_completions(client, tmp_path):
    made = client.completions.create(model="plain", prompt=["ab", "c"], max_tokens=9, seed=4, n=2, logprobs=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(made.choices, [("ab", 4), ("ab", 5), ("c", 4), ("c", 5)], strict=True):
        assert choice.text == expected(tmp_path, prompt, 9, seed)
        assert choice.finish_reason == "length" and len(choice.logprobs.tokens) == 9
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    assert made.usage.prompt_tokens == 3 and made.usage.completion_tokens == 36


def test_streamed_completions(client, tmp_path):
    chunks = list(
        client.completions.create(
            model="plain",
            prompt="ab",
            max_tokens=9,
            seed=4,
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == "ab" + expected(tmp_path, "ab", 9, 4)
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.total_tokens == 11


def test_a_stop_string_ends_a_completion(client, tmp_path):
    whole = expected(tmp_path, "ab", 30, 0)
    stop = whole[5:7]
    made = client.completions.create(model="plain", prompt="ab", max_tokens=30, seed=0, stop=stop)
    assert made.choices[0].text == whole[: whole.index(stop)] and made.choices[0].finish_reason == "stop"


def test_chat(client):
    messages = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}]},
    ]
    settings = {"model": "chat", "messages": messages, "max_completion_tokens": 8, "seed": 1}
    made = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    (choice,) = made.choices
    assert choice.message.role == "assistant" and choice.message.content
    tokens = choice.logprobs.content
    assert made.usage.completion_tokens == len(tokens) and len(tokens[0].top_logprobs) == 3
    chunks = list(client.chat.completions.create(**settings, stream=True))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.UnprocessableEntityError, match="special tokens"):
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.completions.create(model="plain", prompt="a", temperature=-1)
    with pytest.raises(openai.UnprocessableEntityError, match="vocabulary"):
        client.completions.create(model="plain", prompt=[5000])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
