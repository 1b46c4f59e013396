"""Edited or damaged files of runs and exports: an error in one line or a warning, never a traceback.

All cases: uv run pytest -m slow tests/test_edited_files.py. Alone: uv run pytest tests/test_edited_files.py
"""

import json
import os
import random
import shutil
from pathlib import Path

import edited
import pytest
import safetensors.torch
import small_models
import yaml

from llm_basics import swap
from llm_basics.analysis import compare, figures, sweep
from llm_basics.cli import checkpoint_commands, commands, parse, subcommands
from llm_basics.data import chat_template, prepare, tokenizer_commands
from llm_basics.evaluation import compare_models
from llm_basics.inference import chat_session, samples
from llm_basics.interop import hf_export, hf_import
from llm_basics.learn import __main__ as learn
from llm_basics.runs import checkpoint, run_dir
from llm_basics.runs import lines as run_lines
from llm_basics.training import job, loop, sft

TINY = (
    "--train.steps 2 --train.batch_size 2 --train.log_every 1 --train.eval_every 1 --train.eval_batches 1 "
    "--train.checkpoint_every 1 --train.sample_every 1 --train.sample_tokens 3 --train.device cpu --fast off "
    "--data_dir data"
)
MODEL = "--model.d_model 16 --model.n_layers 1 --model.n_heads 2 --model.d_ff 24 --model.context_length 16"
PLAIN = "--device cpu --fast off --max_new_tokens 3"


def program(main, defaults, arguments):
    return lambda: main(parse.program_options(defaults, arguments.split(), "program"))


def training(arguments, main=job.main, preset="tiny"):
    return lambda: main(parse.train_options(arguments.split(), preset=preset))


# programs that read a run, by the files that they read
PROGRAMS = {
    "generate": program(samples.main, commands.GenerateConfig(), f"run --prompt a {PLAIN}"),
    "generate probs": program(
        samples.main, commands.GenerateConfig(), f"run --prompt a --show_probs {PLAIN}"
    ),
    "generate best": program(
        samples.main, commands.GenerateConfig(), f"run --samples 2 --checkpoint best --temperature 0 {PLAIN}"
    ),
    "chat": program(chat_session.main, commands.ChatConfig(), f"run --message a {PLAIN}"),
    "evaluate": program(
        compare_models.main, commands.EvaluateConfig(), "run --device cpu --fast off --choices choices.jsonl"
    ),
    "evaluate own": program(compare_models.main, commands.EvaluateConfig(), "run --device cpu --fast off"),
    "plot": program(figures.main, commands.PlotConfig(), "run --out made.png"),
    "plot time": program(figures.main, commands.PlotConfig(), "run --out made.png --x time --log --smooth 3"),
    "compare": program(compare.main, commands.CompareConfig(), "run other"),
    "compare page": program(compare.main, commands.CompareConfig(), "run other --out made.html --x tokens"),
    "checkpoint list": program(checkpoint_commands.main, subcommands.CHECKPOINT, "list run"),
    "checkpoint verify": program(checkpoint_commands.main, subcommands.CHECKPOINT, "verify run"),
    "checkpoint prune": program(checkpoint_commands.main, subcommands.CHECKPOINT, "prune run"),
    "export": program(hf_export.main, commands.ExportConfig(), "run --out made"),
    "resume": training("--resume run --train.steps 3"),
    "replay": training("--replay run --run_dir made"),
    "warm start": training(f"--init_from run --run_dir made --data text.txt {TINY}"),
    "sft": training(f"--init_from run --run_dir made --data chats.jsonl {TINY}", sft.main, "sft"),
    "learn read": lambda: learn.main(["read", "run"]),
    "tokenizer inspect": program(
        tokenizer_commands.main, subcommands.TOKENIZER, "inspect text --tokenizer run/tokenizer"
    ),
    "tokenizer compare": program(
        tokenizer_commands.main,
        subcommands.TOKENIZER,
        "compare run/tokenizer bytes --data text.txt --fast off",
    ),
    "prepare": program(
        prepare.main, commands.PrepareConfig(), "text.txt --tokenizer run/tokenizer --out made --fast off"
    ),
    "import": program(hf_import.main, commands.ImportConfig(), "export --out made"),
    "import shards": program(hf_import.main, commands.ImportConfig(), "sharded --out made"),
    "tokenizer of export": program(
        tokenizer_commands.main, subcommands.TOKENIZER, "inspect text --tokenizer export/tokenizer.json"
    ),
    "prepare with export": program(
        prepare.main, commands.PrepareConfig(), "text.txt --tokenizer export --out made --fast off"
    ),
    "prompts": program(
        samples.main, commands.GenerateConfig(), f"run --prompts prompts.jsonl --out made.jsonl {PLAIN}"
    ),
    "prepare lines": program(
        prepare.main, commands.PrepareConfig(), "texts.jsonl --tokenizer bytes --out made --fast off"
    ),
    "config": training("--config options.yaml --run_dir made --data text.txt --tokenizer bytes"),
    "sweep": program(sweep.main, commands.SweepConfig(), "sweep.yaml --out made"),
    "prepared": training(f"--data prepared --run_dir made {MODEL} {TINY}"),
    "prepared again": program(
        prepare.main, commands.PrepareConfig(), "text.txt --tokenizer bytes --out prepared --fast off"
    ),
}
LOADING = ["generate", "generate probs", "generate best", "chat", "evaluate", "evaluate own", "export"]
LOADING += ["warm start", "sft", "resume", "replay"]
TOKENIZER = [*LOADING, "tokenizer inspect", "tokenizer compare", "prepare"]
CHECKPOINTS = ["checkpoint list", "checkpoint verify", "checkpoint prune"]

# the files, and the programs that read each
FILES = {
    "run/config.json": [*LOADING, *CHECKPOINTS, "plot", "plot time", "compare", "compare page", "learn read"],
    "run/metrics.jsonl": ["plot", "plot time", "compare", "compare page", "export", "resume", "learn read"],
    "run/events.jsonl": ["replay"],
    "run/samples.jsonl": ["compare", "compare page", "resume"],
    "run/checkpoints/step_00000002.safetensors": [*LOADING, *CHECKPOINTS],
    "run/checkpoints/step_00000001.safetensors": [
        "checkpoint list",
        "checkpoint prune",
        "generate best",
        "resume",
    ],
    "run/tokenizer/vocab.json": TOKENIZER,
    "run/tokenizer/merges.txt": TOKENIZER,
    "run/tokenizer/special_tokens.json": TOKENIZER,
    "export/config.json": ["import"],
    "export/model.safetensors": ["import"],
    "export/tokenizer.json": ["import", "tokenizer of export", "prepare with export"],
    "export/tokenizer_config.json": ["import"],
    "export/generation_config.json": ["import"],
    "sharded/model.safetensors.index.json": ["import shards"],
    "sharded/model-00001.safetensors": ["import shards"],
    "choices.jsonl": ["evaluate"],
    "prompts.jsonl": ["prompts"],
    "texts.jsonl": ["prepare lines"],
    "chats.jsonl": ["sft"],
    "options.yaml": ["config"],
    "sweep.yaml": ["sweep"],
    "prepared/meta.json": ["prepared", "prepared again"],
    "prepared/tokenizer/vocab.json": ["prepared"],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with a run, its export, prepared text and files of options, all valid."""
    home = tmp_path_factory.mktemp("edited")
    before = os.getcwd()
    os.chdir(home)
    try:
        Path("text.txt").write_text("".join(f"{i} the times {i} is\n" for i in range(90)))
        small_models.tokenizer(("<|endoftext|>", *chat_template.SPECIALS)).save("tokenizer")
        done = training(f"--data text.txt --tokenizer tokenizer --run_dir run {MODEL} {TINY}")()
        assert done == 0
        shutil.copytree("run", "other")
        assert program(hf_export.main, commands.ExportConfig(), "run --out export")() == 0
        shutil.copytree("export", "sharded")
        Path("sharded/model.safetensors").rename("sharded/model-00001.safetensors")
        names = safetensors.torch.load_file("sharded/model-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001.safetensors")}
        Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
        lines = {
            "choices.jsonl": [{"prompt": "a", "choices": ["b", "c"], "answer": i} for i in range(2)],
            "prompts.jsonl": [{"prompt": "a"}, {"prompt": "the", "name": 1}],
            "texts.jsonl": [{"text": f"the text {i}"} for i in range(30)],
            "chats.jsonl": [{"prompt": f"a{i}", "completion": "b"} for i in range(9)],
        }
        turns = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
        lines["chats.jsonl"][3] = {"messages": turns}
        for name, records in lines.items():
            Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
        options = run_dir.read_config("run")
        for name in ("run_dir", "config", "resume"):
            del options[name]
        Path("options.yaml").write_text(yaml.safe_dump(options))
        grid = {"base": options, "grid": {"train.lr": [1e-3]}, "seeds": [0, 1]}
        Path("sweep.yaml").write_text(yaml.safe_dump(grid))
        assert PROGRAMS["prepared again"]() == 0
        yield home
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Training programs end before their first step: an edited number of steps may be any."""
    monkeypatch.setattr(sweep, "train_all", lambda trial_runs, jobs: {})
    monkeypatch.setattr(loop, "fit", lambda training, output: None)
    monkeypatch.setattr(job, "conclude", lambda *_: None)


@pytest.fixture
def folder(originals, tmp_path, monkeypatch):
    """A copy of the originals, in which the test runs."""
    shutil.copytree(originals, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def run(name, capfd):
    """The exit status of a program, and what it wrote to standard error."""
    capfd.readouterr()
    try:
        with swap.restored():
            status = PROGRAMS[name]()
    except SystemExit as stop:
        status = stop.code
    return status or 0, capfd.readouterr().err


# --------------------------------------------------------------------------------------------------
# Generated cases


def trouble(name, capfd):
    """What is wrong with how a program ends, if anything."""
    try:
        status, error = run(name, capfd)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    # 1: damaged checkpoints, weights that are not finite; 3: nothing is saved, since nothing is trained
    if status not in (0, 1, 2, 3, 4):
        return f"exit status {status}"
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    if len(lines) != (status in (2, 4)) and status != 1:
        return f"exit status {status} with {error!r}"
    if "Traceback" in error or len(error) > 3000 or not error.replace("\n", "").isprintable():
        return f"it printed {error!r:.300}"
    return None


@pytest.mark.parametrize("n_cases", [len(FILES), pytest.param(600, marks=pytest.mark.slow)])
def test_no_edited_file_gives_a_traceback(originals, tmp_path, monkeypatch, capfd, n_cases):
    """Each file of a run and of an export with one change, given to a program that reads it."""
    found = []
    for case in range(n_cases):
        choose, folder = random.Random(case), tmp_path / str(case)
        file = list(FILES)[case % len(FILES)]
        shutil.copytree(originals, folder)
        monkeypatch.chdir(folder)
        done, name = edited.edit(Path(file), choose), choose.choice(FILES[file])
        if problem := trouble(name, capfd):
            found.append(f"case {case}: {name} with {file}, {done}: {problem}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert not found, "\n".join(found)


# --------------------------------------------------------------------------------------------------
# What the error says


@pytest.mark.parametrize("name", FILES["run/config.json"])
def test_options_that_are_a_list(folder, capfd, name):
    Path("run/config.json").write_text("[]")
    status, error = run(name, capfd)
    if name.startswith("checkpoint"):  # without the options
        assert (status, error) == (0, "")
    else:
        message = "error: run/config.json must hold an object of options, got list\n"
        assert (status, error) == (2, message)


@pytest.mark.parametrize("name", FILES["run/metrics.jsonl"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "two", "must have a whole number as step, got 'two'"),
        ("step", 2.0, "must have a whole number as step, got 2.0"),
        ("val_loss", [1], "must have a number as val_loss, got [1]"),
        ("val_loss", float("inf"), "must have a number as val_loss, got inf"),
    ],
)
def test_a_line_of_metrics_that_was_edited(folder, capfd, name, key, value, message):
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | {key: value}) + "\n"
    path.write_text("".join(lines))
    error = f"error: run/metrics.jsonl:2 {message}; correct or delete the line\n"
    assert run(name, capfd) == (2, error)


def test_a_sample_without_text(folder, capfd):
    with open("run/samples.jsonl", "a") as file:
        file.write('{"step": 3, "prompt": "a", "text": null}\n')
    number = len(Path("run/samples.jsonl").read_text().splitlines())
    error = (
        f"error: run/samples.jsonl:{number} must have a text as text, got None; correct or delete the line\n"
    )
    assert run("compare", capfd) == (2, error)


def test_a_torn_line_is_left_out(folder, capfd):
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train_l')
    assert run("plot", capfd) == (0, "")


def test_a_broken_line_within_a_file_is_a_warning(folder, capfd):
    lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text(lines[0] + '{"step: 3}\n' * 2 + "".join(lines[1:]))
    run_lines._warn.cache_clear()
    warnings = [f"warning: run/metrics.jsonl:{number} is not JSON and is skipped\n" for number in (2, 3)]
    assert run("compare", capfd) == (0, "".join(warnings))


@pytest.mark.parametrize("name", ["generate", "evaluate own", "export"])
def test_a_model_larger_than_its_checkpoint_is_not_allocated(folder, capfd, name):
    path = Path("run/config.json")
    options = json.loads(path.read_text())
    options["model"]["n_layers"] = 1000
    path.write_text(json.dumps(options))
    status, error = run(name, capfd)
    assert status == 2 and "must hold the 2,232,560 weights of the model in run/config.json, got" in error


def test_an_import_with_weights_that_are_not_finite(folder, capfd):
    path = Path("export/model.safetensors")
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, path)
    error = "error: export: model.norm.weight must be finite, but 1 of its 16 weights are not\n"
    assert run("import", capfd) == (2, error) and not Path("made").exists()


@pytest.mark.parametrize("name", ["generate", "generate best", "evaluate own", "chat"])
def test_weights_that_give_no_probabilities(folder, capfd, name):
    """Finite weights can be too large."""
    for path in run_dir.checkpoints("run"):
        tensors, about = checkpoint.read_checkpoint(path)
        tensors["model.lm_head.weight"].fill_(3e38)
        described = json.dumps(about)
        metadata = {"llm_basics": described, "sha256": edited.hashed(tensors, described)}
        path.write_bytes(safetensors.torch.save(tensors, metadata))
    status, error = run(name, capfd)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and "got nan" in error


def test_an_error_that_quotes_a_file_is_short_and_printable(folder, capfd):
    Path("options.yaml").write_text(f'data: {"x" * 10_000}\ntokenizer: ["\\e[31m"]\n')
    status, error = run("config", capfd)
    assert status == 2 and error == "error: tokenizer must be str, got ['\\x1b[31m'] (options.yaml)\n"
    assert parse.message(ValueError("\x1b[31m\u202e\nb")) == "\\x1b[31m\\u202e\nb"
    assert len(parse.message(ValueError("x" * 10_000))) < 2100
