"""Options: defaults, presets, YAML, command line, and their error messages.

Alone: uv run pytest tests/test_config.py
"""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import re
import types
import typing

import pytest

from llm_basics.cli import commands, parse, subcommands
from llm_basics.core import config, option_types, presets
from llm_basics.inference import engine
from llm_basics.learn import __main__ as learn

PRESETS = sorted(path.stem for path in presets.PRESETS.glob("*.yaml"))


def fields(cls, prefix=""):
    """Every option of a config class, as `train.lr`."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{field.name}.")
        else:
            yield prefix + field.name


def help_text(read, arguments=("--help",)):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        read(list(arguments))
    assert stop.value.code == 0
    return out.getvalue()


def complaint(capsys, *arguments):
    """The one line that a wrong command line is answered with."""
    with pytest.raises(SystemExit) as stop:
        parse.train_options(list(arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_presets_that_must_be_there():
    assert set(PRESETS) >= {"tiny", "gpt2-nano", "gpt2-small", "gpt2-medium", "llama-tiny", "ts-17m"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_set_only_what_differs(name):
    def same(options, defaults):
        for key, value in options.items():
            default = getattr(defaults, key)
            if isinstance(value, dict):
                yield from same(value, default)
            elif value == default:
                yield key

    assert presets.load(name).config == name
    assert list(same(presets.read_yaml(name), config.Config(config=""))) == []


def test_command_line_wins_over_file_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: book.txt\nmodel: {n_layers: 7, d_model: 96}\ntrain: {lr: 1e-2, betas: [0.8, 0.9]}\n"
    )
    options = parse.train_options(["--config", str(path), "--model.n_layers", "6", "--train.steps=5"])
    assert (options.data, options.model.n_layers, options.model.d_model) == ("book.txt", 6, 96)
    assert (options.train.lr, options.train.betas, options.train.steps) == (0.01, (0.8, 0.9), 5)
    assert options.train.weight_decay == config.TrainConfig().weight_decay


def test_options_from_parameters_file_and_json_are_the_same(tmp_path):
    written = presets.load("gpt2-nano")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(written)))
    assert presets.update(config.Config(), json.loads(path.read_text()), "here") == written
    made = config.Config(model=config.ModelConfig(n_layers=3))
    assert presets.update(config.Config(), {"model": {"n_layers": 3}}, "here") == made


def test_without_options_the_tiny_preset_is_trained():
    assert parse.train_options([]) == presets.load("tiny")


@pytest.mark.parametrize("spelling", ["--model.n_layers", "--model.n-layers"])
def test_both_spellings_of_a_flag(spelling):
    assert parse.train_options([spelling, "3"]).model.n_layers == 3


def test_help_has_every_option_with_its_default_and_meaning():
    text = " ".join(help_text(parse.train_options).replace("\u2502", " ").split())
    for name in fields(config.Config):
        assert f"--{name}" in text, name
    assert text.count("(default: ") == len(list(fields(config.Config)))
    assert "Peak learning rate" in text


ALL_OPTIONS = [
    cls
    for module in (config, commands, subcommands, learn)
    for cls in vars(module).values()
    if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
]


@pytest.mark.parametrize("cls", ALL_OPTIONS)
def test_every_option_is_documented(cls):
    body = inspect.getsource(cls)
    for field in dataclasses.fields(cls):
        if field.name in vars(cls).get("__annotations__", ()) and not dataclasses.is_dataclass(field.type):
            line = body.split(f"    {field.name}: ")[1].split("\n")[1]
            assert line.startswith('    """') and len(line) > 20, field.name


# a value of each type that is none of it, or beyond what any option can be
WRONG = {
    float: (math.nan, math.inf, -math.inf, True, "1", None),
    int: (10**16, 10**400, -1, 2.5, 1.0, math.nan, True, "1"),
    bool: (1, "on"),
    str: (5,),
}


def make(cls, **values):
    """An instance as outside of tests, where annotations are not checked before `__post_init__`."""
    made = object.__new__(cls)
    inspect.unwrap(cls.__init__)(made, **values)
    return made


@pytest.mark.parametrize("cls", ALL_OPTIONS)
def test_every_option_refuses_what_its_type_excludes(cls):
    needed = [f for f in dataclasses.fields(cls) if f.default is f.default_factory]
    required = {f.name: ("x",) if "tuple" in str(f.type) else "x" for f in needed}
    usual = make(cls, **required)
    for name, hint in option_types.declared(cls).items():
        kinds = set()
        while typing.get_args(hint):
            kinds.add(typing.get_origin(hint))
            hint = typing.get_args(hint)[0]
        if not issubclass(cls, option_types.Options):
            assert hint in (str, bool), f"{cls.__name__}.{name} is not checked"
            continue
        for wrong in ("bogus", 3) if typing.Literal in kinds else WRONG.get(hint, (3,)):
            if wrong is not None or not kinds & {typing.Union, types.UnionType}:
                value = (wrong, *getattr(usual, name)[1:]) if tuple in kinds else wrong
                with pytest.raises(ValueError, match=rf"\b{name} must be "):
                    make(cls, **required | {name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "bogus"}, "model.norm must be rms or layer or none, got 'bogus'"),
        ({"n_layers": 2.5}, "model.n_layers must be int, got 2.5"),
        ({"vocab_size": True}, "model.vocab_size must be int, got True"),
        ({"vocab_size": 2**31}, "model.vocab_size must be at most 2,147,483,647"),
        ({"norm_eps": 0}, "model.norm_eps must be above 0 and at most 1, got 0"),
        ({"d_ff": 0}, "model.d_ff must be at least 1, got 0"),
    ],
)
def test_a_model_config_in_python_is_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(config.ModelConfig, **options)


def test_adamw_defaults():
    train = config.TrainConfig()
    assert (train.lr, train.weight_decay, train.betas) == (3e-4, 0.1, (0.9, 0.95))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.n_layer", "3"],
            "unknown option --model.n_layer (command line); the closest is --model.n_layers",
        ),
        (["--trian.lr", "3"], "the closest is --train.lr"),
        (["--steps=3"], "the closest is --train.steps"),
        (["--lr=3"], "the closest is --train.lr"),
        (["--zebra=3"], "unknown option --zebra (command line); --help lists all"),
        (["--train.lr", "fast"], "--train.lr: could not convert string to float: 'fast'"),
        (["--train.lr"], "Missing value for argument '--train.lr'"),
        (["--model.norm", "batch"], "Expected one of ('rms', 'layer', 'none')"),
        (["--model.d_model", "100", "--model.n_heads", "3"], "got 100 and 3; try d_model 99 or 102"),
        (
            ["--model.d_model", "12", "--model.n_heads", "4"],
            "d_model / n_heads must be even with position rope, got 3",
        ),
        (["--model.n_kv_heads", "2"], "model.n_heads must be divisible by model.n_kv_heads, got 3 and 2"),
        (["--train.steps", "0"], "train.steps must be at least 1, got 0"),
        (["--train.min_lr", "9"], "train.min_lr must be at most lr (0.015), got 9.0"),
        (["--val_fraction", "1"], "val_fraction must be above 0 and below 1, got 1.0"),
        (["--train.seed", "-1"], "train.seed must be at least 0, got -1"),
        (["--model.rope_theta", "0"], "model.rope_theta must be above 0, got 0.0"),
        (["--train.lr", "nan"], "train.lr must be at least 0 and finite, got nan"),
        (["--train.max_grad_norm", "nan"], "train.max_grad_norm must be above 0 and finite, got nan"),
        (["--train.weight_decay", "inf"], "train.weight_decay must be at least 0 and finite, got inf"),
        (["--train.z_loss", "nan"], "train.z_loss must be at least 0 and finite, got nan"),
        (["--train.eps", "inf"], "train.eps must be at least 0 and at most 1, got inf"),
        (["--train.eps", "1e9"], "train.eps must be at least 0 and at most 1, got 1000000000.0"),
        (["--train.steps", "1" + 20 * "0"], "train.steps must be at most 1,000,000,000,000,000, got 1000"),
        (["--train.seed", "4294967296"], "train.seed must be at most 4,294,967,295, got 4294967296"),
        (["--train.stride", "0"], "train.stride must be at least 1, got 0"),
        (
            ["--train.stride", "9", "--model.context_length", "8"],
            "train.stride must be at most model.context_length 8, got 9",
        ),
        (["--train.betas", "2", "3"], "train.betas must be at least 0 and below 1, got (2.0, 3.0)"),
        (["--resume", "r", "--run_dir", "x"], "--resume cannot be combined with --run_dir"),
        (["--config"], "Missing value for argument '--config'"),
        (["--config", "tini"], "--config must be a preset (dpo, gpt2-medium, "),
        (["--resume", "nowhere"], "a run directory must hold config.json, got nowhere"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    assert message in complaint(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {n_layer: 3}", "unknown option model.n_layer ({path}); the closest is model.n_layers"),
        ("steps: 20", "unknown option steps ({path}); the closest is train.steps"),
        ("zebra: 20", "unknown option zebra ({path}); --help lists all"),
        ("train: {lr: fast}", "train.lr must be float, got 'fast' ({path})"),
        ("train: {steps: 1.5}", "train.steps must be int, got 1.5 ({path})"),
        ("train: {betas: 0.9}", "train.betas must be 2 values, got 0.9 ({path})"),
        ("wandb: 1", "wandb must be bool, got 1 ({path})"),
        ("model: 3", "model must be a mapping of options, got 3 ({path})"),
        ("- a\n- b", "{path} must hold `option: value` lines, got list"),
        ("a: [", "{path}:1 must be YAML; expected the node content, but found '<stream end>' in column 5\n"),
        ("a: 1\nb: [1\nc: 2", "{path}:3 must be YAML; expected ',' or ']', but got ':' in column 2\n"),
        ("a: 1\nb: \tx\n  - y", "{path}:2 must be YAML; found character '\\t' that"),
        ("a: 1\nb: \0", "{path}:2 must be YAML; special characters are not allowed in column 4\n"),
        (b"a: 1\nb: \xff", "{path}:2 must be UTF-8, got byte 0xff at offset 8; fix the file\n"),
        ("model: {norm: batch}", "model.norm must be rms or layer or none, got 'batch' ({path})"),
        ("train: {lr: .nan}", "train.lr must be at least 0 and finite, got nan ({path})"),
        (
            "train: {betas: [0.9, 1e400]}",
            "train.betas must be at least 0 and below 1, got [0.9, '1e400'] ({path})",
        ),
        ("train: {batch_size: 1.0e+9}", "train.batch_size must be int, got 1000000000.0 ({path})"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message.format(path=path) in complaint(capsys, "--config", str(path))


def test_resume_takes_the_options_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    options = dataclasses.replace(presets.load("gpt2-nano"), data="book.txt")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_00000001.safetensors").touch()
    for named in (str(folder), "auto"):
        resumed = parse.train_options(["--resume", named, "--train.steps", "9"])
        assert (resumed.data, resumed.model, resumed.train.steps) == ("book.txt", options.model, 9)
        assert resumed.resume is not None and resumed.resume.endswith("old")


REMOVED = {"value_embeddings": False, "x0_skips": False, "logit_softcap": None}


def test_removed_options_that_were_off_are_left_out():
    written = presets.load("gpt2-nano")
    stored = json.loads(json.dumps(dataclasses.asdict(written)))
    stored["model"] |= REMOVED
    assert presets.update(config.Config(), stored, "here") == written


@pytest.mark.parametrize(
    ("name", "value"), [("value_embeddings", True), ("x0_skips", True), ("logit_softcap", 15.0)]
)
def test_removed_options_that_were_on_are_refused(capsys, tmp_path, name, value):
    options = dataclasses.asdict(presets.load("gpt2-nano"))
    options["model"] |= REMOVED | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(options))
    message = f"model.{name} must be {REMOVED[name]}, got {value} ({tmp_path}/config.json); this version has"
    assert f"{message} no such option" in complaint(capsys, "--resume", str(tmp_path))
    with pytest.raises(ValueError, match=f"model.{name} must be {REMOVED[name]}, got {value}"):
        engine.load_run(tmp_path)


def generate_options(arguments):
    return parse.program_options(commands.GenerateConfig(), arguments, prog="generate")


def test_a_run_with_the_removed_triton_kernels_loads_as_fast(tmp_path, capsys):
    options = {**dataclasses.asdict(config.Config()), "fast": "triton"}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert parse.train_options(["--resume", str(tmp_path)]).fast == "on"
    assert capsys.readouterr().err == (
        f"fast triton ({tmp_path}/config.json) no longer exists: loaded as on\n"
    )
    assert "'triton'" in complaint(capsys, "--fast", "triton")


def test_generate_has_its_own_options(capsys):
    options = generate_options(["runs/x", "--prompt", "def ", "--temperature", "0"])
    assert (options.run_dir, options.prompt, options.temperature, options.top_k) == (
        "runs/x",
        "def ",
        0.0,
        None,
    )
    assert "--top_p" in help_text(generate_options)
    with pytest.raises(SystemExit):
        generate_options(["--promt", "x"])
    assert "the closest is --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("--run_dir", "--help lists all"), ("--folder", "--help lists all"), ("--outt", "the closest is --out")],
)
def test_what_is_suggested_is_near_and_can_be_typed(capsys, wrong, message):
    """The folder to import has its place and no name, and is not like a run_dir."""
    with pytest.raises(SystemExit, match="2"):
        parse.program_options(commands.ImportConfig(), ["x", wrong, "y"], "import_model")
    assert capsys.readouterr().err == f"error: unknown option {wrong} (command line); {message}\n"


@pytest.mark.parametrize(
    "wrong", [("--temperature", "-1"), ("--top_k", "0"), ("--top_p", "2"), ("--samples", "0")]
)
def test_generation_that_cannot_work_is_refused_at_once(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        generate_options(list(wrong))
    assert stop.value.code == 2 and "got" in capsys.readouterr().err
