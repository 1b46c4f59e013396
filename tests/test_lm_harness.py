"""lm-evaluation-harness on our models. Alone: `uv run --extra eval pytest tests/test_lm_harness.py`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_compare_models import QUESTIONS, make_run

from llm_basics.cli import commands, parse
from llm_basics.core import generate, tokenizer
from llm_basics.evaluation import multiple_choice
from llm_basics.inference import engine

lm_eval = pytest.importorskip("lm_eval", reason="uv sync --extra eval")

from lm_eval import tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from llm_basics.evaluation import lm_harness  # noqa: E402

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_bytes}}]
"""
MORE = [
    {"prompt": "2 + 2 =", "choices": ["4", "twenty-two"], "answer": 0},
    {"prompt": "a prompt that has more to it than goes into this model", "choices": ["b", "cd"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, a task in YAML and its questions."""
    folder = tmp_path_factory.mktemp("harness")
    make_run(folder)
    questions = [{"prompt": q.get("prompt") or q["question"], **q} for q in QUESTIONS] + MORE
    for question in questions:
        question.pop("question", None)
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.yaml").write_text(
        TASK.format(path=folder / "q.jsonl", cache=folder / "cache").strip()
    )
    return folder


@pytest.fixture(scope="module")
def harness_model(folder):
    return lm_harness.HarnessModel(str(folder / "a"), device="cpu", batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_a_task_gives_the_scores_of_multiple_choice(folder, harness_model):
    manager = tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(harness_model, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    ours = multiple_choice.evaluate(
        harness_model.model,
        harness_model.own_tokenizer,
        multiple_choice.read(folder / "q.jsonl"),
        batch_size=2,
    )
    samples = sorted(found["samples"]["mine"], key=lambda sample: sample["doc_id"])
    theirs = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    assert len(theirs) == 4
    for scores, question in zip(theirs, ours.questions, strict=True):
        assert scores == pytest.approx(question.log_probabilities, abs=1e-4)
    results = found["results"]["mine"]
    assert results["acc,none"] == ours.accuracy and results["acc_bytes,none"] == ours.accuracy_per_byte


@pytest.mark.parametrize("prompt", ["is", "is ", "a\n\n", "", "x" * 60])
def test_the_harness_encodes_a_choice_like_multiple_choice(harness_model, prompt):
    """Prompt and choice are split by the code of the harness here, and by `multiple_choice.encode` there."""
    question = multiple_choice.Question(prompt, ("Pa", "\u00e9"), 0)
    texts = [(" " if prompt == "is" or len(prompt) > 9 else "") + choice for choice in question.choices]
    theirs = harness_model.loglikelihood(
        requests("loglikelihood", *((prompt, text) for text in texts)), disable_tqdm=True
    )
    (ours,) = multiple_choice.evaluate(harness_model.model, harness_model.own_tokenizer, [question]).questions
    assert [score for score, _ in theirs] == pytest.approx(ours.log_probabilities, abs=1e-4)


def test_a_continuation_is_greedy_if_the_model_generates_it(harness_model):
    lm = harness_model.model
    ids = list(generate.generate(lm, torch.tensor(list(b"ab")), 1, temperature=0.0))
    while ids[0] == 256 or ids[0] > 127:
        lm.lm_head.weight.data[ids[0]] -= 10 * lm.lm_head.weight.data[ids[0]]
        ids = list(generate.generate(lm, torch.tensor(list(b"ab")), 1, temperature=0.0))
    written = bytes(ids).decode()
    other = "x" if written != "x" else "y"
    found = harness_model.loglikelihood(
        requests("loglikelihood", ("ab", written), ("ab", other)), disable_tqdm=True
    )
    assert [is_greedy for _, is_greedy in found] == [True, False]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 80])
def test_a_whole_text_is_as_likely_as_its_tokens(harness_model, n):
    text = ("the cat sat on the mat, and " * 9)[:n]
    (found,) = harness_model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    tokens, expected, end = [256, *text.encode()], 0.0, 0
    for i in range(n):
        end = min(end + 32, n) if i == end else end
        with torch.no_grad():
            read = torch.tensor([tokens[max(0, end - 32) : i + 1]])
            logits = harness_model.model(read)[0, -1].double()
        expected += logits.log_softmax(-1)[tokens[i + 1]].item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_text_is_written_up_to_a_stop(harness_model):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (whole,) = harness_model.generate_until(requests("generate_until", ("the cat", settings)))
    ids = engine.complete(harness_model.model, harness_model.own_tokenizer, "the cat", 12, temperature=0.0)
    assert whole == "".join(ids) and len(whole) > 3
    stop = whole[2]
    for until in (stop, [stop], ["never", stop]):
        (cut,) = harness_model.generate_until(
            requests("generate_until", ("the cat", settings | {"until": until}))
        )
        assert cut == whole[: whole.index(stop)]


def test_the_model_is_known_to_the_harness_by_name(folder):
    from lm_eval.api import registry

    made = registry.get_model("llm_basics").create_from_arg_string(f"run_dir={folder / 'a'},device=cpu")
    assert made.tok_encode("<|endoftext|>") == tokenizer.Tokenizer.byte_level().encode_ordinary(
        "<|endoftext|>"
    )
    assert made.eot_token_id == made.prefix_token_id == 256


def test_the_module_is_a_program(folder):
    out = folder / "results.json"
    command = [sys.executable, "-m", "llm_basics.lm_harness", str(folder / "a"), "--tasks", "mine"]
    command += ["--include_path", str(folder / "tasks"), "--out", str(out), "--fast", "off"]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|mine" in done.stdout and "Metric" in done.stdout and "acc_bytes" in done.stdout
    assert json.loads(out.read_text())["n-samples"]["mine"]["effective"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tasks must name at least one task, got none"),
        ({"tasks": ("mine", "nothing_such")}, "--tasks must name known tasks, got nothing_such"),
        ({"tasks": ("mine",), "run_dir": "nowhere"}, "nowhere"),
        ({"tasks": ("mine",), "out": "nowhere/x.json"}, "--out must be in an existing folder"),
    ],
)
def test_an_error_is_one_line(folder, capsys, options, message):
    chosen = {"run_dir": str(folder / "a"), "include_path": str(folder / "tasks"), "fast": "off"} | options
    with pytest.raises(SystemExit, match="2"):
        lm_harness.main(commands.HarnessConfig(**chosen))
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: ")


def test_tasks_on_the_command_line():
    arguments = ["runs/a", "--tasks", "arc_easy", "hellaswag", "--limit", "9"]
    options = parse.program_options(commands.HarnessConfig(), arguments, prog="lm_harness")
    assert (options.run_dir, options.tasks, options.limit) == ("runs/a", ("arc_easy", "hellaswag"), 9)
