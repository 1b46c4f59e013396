"""The program of evaluate. Alone: `uv run pytest tests/test_compare_models.py`."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from llm_basics.cli import commands, parse
from llm_basics.core import config, dataloader, evaluate, model, optim
from llm_basics.data import prepare, shards
from llm_basics.evaluation import compare_models
from llm_basics.runs import checkpoint, run_dir

QUESTIONS = [
    {"prompt": "the cat sat on the", "choices": ["mat", "a very long answer"], "answer": 0},
    {"question": "Document", "choices": ["1", "2", "seventeen"], "answer": 2},
]


def make_run(folder, name="a", seed=0, **about):
    """A run with a random byte-level model, with its training text in `folder`."""
    text = folder / "text"
    if not text.is_dir():
        text.mkdir(parents=True)
        for i in range(20):
            (text / f"{i}.txt").write_text(f"Document {i}: the cat sat on the mat.\n" * (i + 1))
    shape = config.ModelConfig(257, context_length=32, d_model=16, n_layers=1, n_heads=2)
    options = config.Config(
        data=str(text), data_dir=str(folder / "data"), tokenizer="bytes", val_fraction=0.3, model=shape
    )
    prepared = prepare.prepare(options, log=lambda line: None)
    torch.manual_seed(seed)
    made = model.TransformerLM(shape)
    output = run_dir.RunDir(folder / name)
    output.write_config(dataclasses.asdict(options))
    prepared.tokenizer.save(output.folder / "tokenizer")
    about = {"data": prepared.folder.name, "val_loss": None} | about
    checkpoint.save_checkpoint(
        made, optim.AdamW(made.parameters(), 1e-3), 7, output.checkpoint_path(7), **about
    )
    output.close()
    return output.folder, made, prepared


@pytest.fixture
def trained(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def evaluate_runs(tmp_path, capsys):
    """Run the program; returns its JSON report and its output."""

    def main(*folders, **options):
        out = tmp_path / "report.json"
        chosen = commands.EvaluateConfig(
            run_dirs=tuple(map(str, folders)), out=str(out), fast="off", **options
        )
        assert compare_models.main(chosen) == 0
        return json.loads(out.read_text(), parse_constant=pytest.fail), capsys.readouterr().out

    return main


def error_line(capsys, options):
    with pytest.raises(SystemExit) as stop:
        compare_models.main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def test_the_whole_held_out_split_is_evaluated(trained, evaluate_runs):
    folder, made, prepared = trained
    (found,), out = evaluate_runs(folder)
    tokens = prepared.val.tokens
    assert found["report"]["n_tokens"] == len(tokens) - 1
    assert sum(bucket["count"] for bucket in found["report"]["by_position"]) == len(tokens) - 1
    n_whole = (len(tokens) - 1) // 32 * 32
    lengths = evaluate.token_lengths(prepared.tokenizer, 257)
    known = evaluate.evaluate(made, dataloader.sequential_batches(tokens[: n_whole + 1], 4, 32), lengths)
    assert found["report"]["val_loss"] == pytest.approx(known["val_loss"], abs=0.02)
    assert f"text: held out in {prepared.folder}" in out.replace("\n", "")
    assert f"{found['report']['val_loss']:.4f}" in out and f"{found['report']['perplexity']:.2f}" in out
    assert found["checkpoint"].endswith("step_00000007.safetensors") and found["answers"] is None


def test_other_text_is_read_document_by_document(trained, evaluate_runs, tmp_path):
    folder, _, _ = trained
    (tmp_path / "new.txt").write_text("one<|endoftext|>two\u00e9")
    (found,), out = evaluate_runs(folder, data=str(tmp_path / "new.txt"), stride=2)
    # o n e <|endoftext|> t w o \xc3 \xa9 <|endoftext|>, the first of which is not predicted
    assert (found["report"]["n_tokens"], found["report"]["n_bytes"]) == (9, 7)
    assert "Loss by position" in out and "Calibration" in out


def test_the_held_out_split_of_a_prepared_folder_is_found(trained, evaluate_runs):
    folder, _, prepared = trained
    options = json.loads((folder / "config.json").read_text())
    options |= {"data": str(prepared.folder), "data_dir": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(options))
    (found,), _ = evaluate_runs(folder)
    assert found["report"]["n_tokens"] == len(prepared.val.tokens) - 1


def test_several_runs_are_shown_side_by_side(trained, evaluate_runs, tmp_path):
    other, _, _ = make_run(tmp_path, "b", seed=1)
    found, out = evaluate_runs(trained[0], other)
    losses = [f"{each['report']['val_loss']:.4f}" for each in found]
    assert losses[0] != losses[1]
    line = next(line for line in out.splitlines() if "validation loss" in line)
    assert re.search(rf"{losses[0]}\s+{losses[1]}", line)
    assert out.count("text: ") == 1 and "(text" not in out and "not comparable" not in out


def test_each_value_on_another_text_names_its_text(trained, evaluate_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    other, _, _ = make_run(tmp_path / "other", "b")
    found, out = evaluate_runs(trained[0], other, trained[0])
    for number, each in enumerate(found[:2], start=1):
        assert f"text {number}: {each['text']}\n" in out
        assert f"Calibration of {each['run']} (text {number}): " in out
    titles = rf"{trained[0]} \(text 1\) +{other} \(text 2\) +{trained[0]} \(text 1\)"
    assert len(re.findall(titles, out)) == 2 and "different texts are not comparable" in out


def test_questions_alone_and_with_a_text(trained, evaluate_runs, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (found,), out = evaluate_runs(trained[0], choices=str(path))
    assert found["report"] is None and "validation loss" not in out
    assert found["answers"]["n_questions"] == 2
    assert found["answers"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    line = next(line for line in out.splitlines() if "answers, per byte" in line)
    assert (
        f"{found['answers']['accuracy_per_byte']:.1%}" in line and "41.7%" in out and "standard error" in out
    )
    (both,), out = evaluate_runs(trained[0], choices=str(path), data=str(tmp_path / "text"))
    assert both["answers"] == found["answers"] and both["report"]["n_tokens"] > 0


def test_fast_kernels_give_the_same_loss(trained, evaluate_runs, tmp_path):
    (found,), _ = evaluate_runs(trained[0])
    out = tmp_path / "fast.json"
    assert compare_models.main(commands.EvaluateConfig(run_dirs=(str(trained[0]),), out=str(out))) == 0
    (fast,) = json.loads(out.read_text())
    assert fast["report"]["val_loss"] == pytest.approx(found["report"]["val_loss"], rel=1e-6)


def test_user_code_is_used_and_then_removed(trained, evaluate_runs, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("import torch\ndef log_softmax(x, dim=-1):\n    return torch.log_softmax(2 * x, dim)\n")
    (found,), _ = evaluate_runs(trained[0])
    (other,), _ = evaluate_runs(trained[0], mine=str(mine))
    (again,), _ = evaluate_runs(trained[0])
    assert other["report"]["val_loss"] != found["report"]["val_loss"] == again["report"]["val_loss"]


def test_a_text_without_bytes_has_no_bits_per_byte(trained, evaluate_runs, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    (found,), _ = evaluate_runs(trained[0], data=str(tmp_path / "one.txt"))
    assert found["report"]["n_tokens"] == 1 and found["report"]["bits_per_byte"] is None


def test_nan_scores_are_exit_status_1(trained, tmp_path, capsys):
    folder, made, prepared = trained
    made.ln_final.weight.data[0] = torch.nan
    path = run_dir.checkpoint_path(folder, 8)
    checkpoint.save_checkpoint(made, optim.AdamW(made.parameters(), 1e-3), 8, path, data=prepared.folder.name)
    out = tmp_path / "report.json"
    with pytest.raises(SystemExit, match="1"):
        compare_models.main(commands.EvaluateConfig(run_dirs=(str(folder),), out=str(out), fast="off"))
    assert "must be numbers, got nan" in capsys.readouterr().err and not out.exists()


# --------------------------------------------------------------------------------------------------
# Errors


def test_a_held_out_split_that_is_missing(trained, capsys):
    folder, _, prepared = trained
    shutil.rmtree(prepared.folder)
    message = error_line(capsys, commands.EvaluateConfig(run_dirs=(str(folder),), fast="off"))
    assert f"must be in {prepared.folder}, got no such folder" in message and "--data" in message


def test_a_model_that_was_not_trained_here(tmp_path, capsys):
    folder, _, _ = make_run(tmp_path, data=None)
    message = error_line(capsys, commands.EvaluateConfig(run_dirs=(str(folder),), fast="off"))
    assert "was not trained here and has no held-out split; name a text with --data" in message


def test_ids_outside_the_vocabulary_are_found_before_the_model_sees_them(trained, capsys):
    folder, _, prepared = trained
    path = prepared.folder / "val_0000.bin"
    content = bytearray(path.read_bytes())
    content[shards.HEADER_BYTES + 20 : shards.HEADER_BYTES + 22] = b"\xff\xff"
    path.write_bytes(content)
    message = error_line(capsys, commands.EvaluateConfig(run_dirs=(str(folder),), fast="off"))
    assert (
        f"{path} must be below its vocabulary size 257, got 65535 at byte {shards.HEADER_BYTES + 20}"
        in message
    )


def test_a_tokenizer_with_more_ids_than_the_model(trained, capsys):
    folder, _, prepared = trained
    larger = prepare.tokenizer.Tokenizer.byte_level(["<|endoftext|>", "<|more|>"])
    larger.save(folder / "tokenizer")
    message = error_line(capsys, commands.EvaluateConfig(run_dirs=(str(folder),), fast="off"))
    assert "must have at most the 257 ids of the model, got 258" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "must be a file"),
        ({"data": "empty.txt"}, "--data must hold text, got an empty source (empty.txt)"),
        ({"choices": "bad.jsonl"}, "bad.jsonl:1: a question must be an object with fields, got int"),
        ({"choices": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"checkpoint": "9"}, "must hold a checkpoint, got none of step 9"),
        ({"stride": 33}, "stride must be from 1 to 32 tokens (the context), got 33"),
        ({"out": "nowhere/report.json"}, "--out must be in an existing folder, got nowhere/report.json"),
        ({"run_dirs": ("nowhere",)}, "nowhere"),
        ({"mine": "mine.txt"}, "a Python file"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    trained, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("3\n")
    before = sorted(tmp_path.iterdir())
    options = {"run_dirs": (str(trained[0]),), "out": "report.json", "fast": "off"} | options
    assert message in error_line(capsys, commands.EvaluateConfig(**options))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strid", "2"], "the closest is --stride"),
        (["--stride", "0"], "stride must be at least 1, got 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_errors_on_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse.program_options(commands.EvaluateConfig(), arguments, prog="evaluate")
    assert message in capsys.readouterr().err


def test_several_runs_on_the_command_line():
    options = parse.program_options(
        commands.EvaluateConfig(), ["runs/a", "runs/b", "--data", "stdlib"], prog="evaluate"
    )
    assert (options.run_dirs, options.data) == (("runs/a", "runs/b"), "stdlib")
    assert parse.program_options(commands.EvaluateConfig(), [], prog="evaluate").run_dirs == ()


def test_the_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make_run(tmp_path, "runs/a")
    assert compare_models.main(commands.EvaluateConfig(fast="off")) == 0
    assert "runs/a" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_missing_harness_is_an_error():
    command = [sys.executable, "-m", "llm_basics.lm_harness", "runs/a", "--tasks", "arc_easy"]
    done = subprocess.run(command, capture_output=True, text=True)
    message = "error: lm_harness needs lm_eval, which is not installed; run uv sync --extra eval\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("besides", ["", ", pairs.jsonl", ", teacher 0123456789ab"])
def test_the_held_out_split_is_found_where_dpo_and_distill_name_more(
    besides, untrained_run, tmp_path, monkeypatch
):
    folder = untrained_run("run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "read_about", lambda path: {"data": f"book-bytes-1{besides}"})
    (tmp_path / "data" / "book-bytes-1").mkdir(parents=True)
    assert compare_models.prepared_folder(folder, folder).name == "book-bytes-1"
