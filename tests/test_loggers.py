"""The terminal, the progress bar, and Weights & Biases. Alone: uv run pytest tests/test_loggers.py"""

import os
import subprocess
import sys
import threading
import time
import types

import pytest

from llm_basics.runs import console, loggers, run_dir


def test_piped_output_is_one_greppable_line_a_measurement(tmp_path, capsys):
    output = run_dir.RunDir(tmp_path, [loggers.ConsoleLogger(total_steps=1000)])
    output.metrics(
        10, train_loss=3.14159, lr=3e-4, grad_norm=0.5, tokens_per_second=12345.6, eta_seconds=61.0
    )
    output.metrics(10, val_loss=3.5, perplexity=33.1, bits_per_byte=1.25, accuracy=0.0)
    assert capsys.readouterr().out.splitlines() == [
        "step=10/1000 train_loss=3.142 lr=0.0003 grad_norm=0.5 tokens_per_second=12346 eta_seconds=61",
        "step=10/1000 val_loss=3.5 perplexity=33.1 bits_per_byte=1.25 accuracy=0",
    ]


def test_terminal_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    terminal = loggers.ConsoleLogger(total_steps=4)
    terminal.metrics({"step": 2, "train_loss": 3.0, "lr": 0.1, "tokens_per_second": 5.0})
    terminal.message("[not] markup")
    terminal.close()
    out = capsys.readouterr().out
    assert "[not] markup" in out and "step 2/4" in out and "train_loss=3" in out


def test_long_work_shows_a_bar_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("TERM", "xterm")
        with console.progress_bar() as report:
            report("reading", 1, 4)
            report("reading", 2, 4)
            report("merging", 1, 1)
        out = capsys.readouterr().out
        assert [word in out for word in ("reading", "50%", "merging", "100%")] == [terminal] * 4, out


# --------------------------------------------------------------------------------------------------
# Weights & Biases, as it should be and as it should not


class FakeWandb(types.ModuleType):
    """The module, its service and its run. At `at`, it calls `instead`."""

    def __init__(self, at="nowhere", instead=None):
        super().__init__("wandb")
        self.at, self.instead, self.calls, self.exit_hooks = at, instead, [], 1

    def step(self, name, *arguments):
        if name == self.at:
            self.instead()
        self.calls.append((name, *arguments))

    def Settings(self, **options):
        return options

    def setup(self, settings):
        self.step("setup")
        return self

    def ensure_service(self):
        return self

    def _cleanup(self):
        self.exit_hooks = 0

    def login(self, **options):
        self.step("login")
        return False

    def init(self, **options):
        self.step("init", options)
        return self

    def define_metric(self, name, step_metric):
        self.step("define_metric", name, step_metric)

    def log(self, values):
        self.step("log", values)

    def finish(self):
        self.step("finish")


@pytest.fixture
def install(monkeypatch):
    """Install a fake wandb with 0.2 s to finish."""
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def put(module):
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


@pytest.fixture
def hang():
    """A function that waits for 60 s or the end of the test."""
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()


def fail():
    raise ConnectionError("no network\nat all")


def leave():
    raise SystemExit(3)


def interrupt():
    raise KeyboardInterrupt


def assert_run_is_whole(folder, lines=1000):
    """A run with many metrics writes all of them without waiting for the logger."""
    began = time.perf_counter()
    follower = loggers.WandbLogger(folder, {})
    output = run_dir.RunDir(folder, [follower])
    assert time.perf_counter() - began < 0.5
    entries = [{"step": step, "train_loss": 2.0} for step in range(lines)]
    began = time.perf_counter()
    for entry in entries:
        follower.metrics(entry)
    assert time.perf_counter() - began < 1
    output.loggers.clear()
    for entry in entries:
        output.metrics(**entry)
    output.loggers.append(follower)
    output.metrics(lines, train_loss=1.0)
    began = time.perf_counter()
    output.close()
    assert time.perf_counter() - began < 1
    assert [entry["step"] for entry in run_dir.read_metrics(folder)] == list(range(lines + 1))
    return follower


def assert_one_warning(error, text):
    assert error.count("\n") == 1
    assert error.startswith("warning: wandb logging stopped (") and text in error


def test_wandb_gets_every_line_in_order(tmp_path, install, capsys):
    wandb = install(FakeWandb())
    follower = loggers.WandbLogger(tmp_path / "my run:1", {"seed": 1})
    lines = [{"step": step, "train_loss": None, "nonfinite": ["train_loss"]} for step in range(1000)]
    for line in lines:
        follower.metrics(line)
    follower.close()
    names = [call[0] for call in wandb.calls]
    assert names == ["setup", "login", "init", "define_metric", *["log"] * 1000, "finish"]
    assert [call[1] for call in wandb.calls if call[0] == "log"] == lines
    assert wandb.calls[3] == ("define_metric", "*", "step")
    options = wandb.calls[2][1]
    assert (options["name"], options["id"], options["resume"]) == ("my run:1", "my-run-1", "allow")
    assert options["mode"] == "offline" and options["config"] == {"seed": 1}
    assert wandb.exit_hooks == 1, "a healthy wandb may tidy up"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("instead", [fail, leave, interrupt])
@pytest.mark.parametrize("at", ["setup", "login", "init", "define_metric", "log", "finish"])
def test_a_wandb_that_throws_costs_one_warning(tmp_path, install, capsys, at, instead):
    wandb = install(FakeWandb(at, instead))
    assert_run_is_whole(tmp_path)
    reason = {fail: "ConnectionError: no network)", leave: "SystemExit: 3", interrupt: "KeyboardInterrupt"}
    assert_one_warning(capsys.readouterr().err, reason[instead])
    assert wandb.exit_hooks == 0 or at == "setup"


@pytest.mark.parametrize("at", ["setup", "login", "init", "log", "finish"])
def test_a_wandb_that_hangs_costs_one_warning(tmp_path, install, capsys, hang, at):
    wandb = install(FakeWandb(at, hang))
    assert_run_is_whole(tmp_path)
    assert_one_warning(capsys.readouterr().err, "it did not finish in time")
    assert wandb.exit_hooks == 0 or at == "setup"


def test_a_wandb_that_is_told_to_stop_while_it_hangs_stops(tmp_path, install, capsys):
    over = threading.Event()
    wandb = install(FakeWandb("log", over.wait))
    follower = assert_run_is_whole(tmp_path)
    over.set()
    follower.thread.join(5)
    assert [call[0] for call in wandb.calls].count("log") == 1 and wandb.calls[-1] != ("finish",)
    assert_one_warning(capsys.readouterr().err, "in time")


def test_a_missing_wandb_costs_one_warning(tmp_path, install, capsys):
    install(None)
    assert_run_is_whole(tmp_path)
    assert_one_warning(capsys.readouterr().err, "ModuleNotFoundError")


@pytest.mark.parametrize("line", ["raise RuntimeError('bad install')", "raise SystemExit(3)", "1 +"])
def test_a_wandb_that_cannot_be_imported_costs_one_warning(tmp_path, monkeypatch, install, capsys, line):
    install(FakeWandb())
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    assert_run_is_whole(tmp_path / "run")
    assert_one_warning(capsys.readouterr().err, "Error" if line != "raise SystemExit(3)" else "SystemExit: 3")


def test_lines_that_wandb_has_no_time_for_are_counted(tmp_path, install, capsys, hang, monkeypatch):
    monkeypatch.setattr(loggers, "QUEUE_LINES", 100)
    install(FakeWandb("init", hang))
    follower = assert_run_is_whole(tmp_path)
    assert follower.lines.qsize() == 101  # and the end
    assert_one_warning(capsys.readouterr().err, "901 lines were dropped")


def test_a_slow_wandb_that_ends_well_tells_what_it_missed(tmp_path, install, capsys, monkeypatch):
    monkeypatch.setattr(loggers, "QUEUE_LINES", 100)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 60)
    gate = threading.Event()
    wandb = install(FakeWandb("init", gate.wait))
    follower = loggers.WandbLogger(tmp_path, {})
    for step in range(103):
        follower.metrics({"step": step})
    gate.set()
    follower.close()
    assert wandb.calls[-1] == ("finish",)
    assert_one_warning(capsys.readouterr().err, "3 lines were dropped")


def test_an_unreachable_server_does_not_keep_the_interpreter(tmp_path):
    """With the real wandb, whose exit hook waits half a minute for its server."""
    program = (
        "import pathlib, sys\n"
        "from llm_basics.runs import loggers, run_dir\n"
        "loggers.CLOSE_SECONDS = 3\n"
        "output = run_dir.RunDir(sys.argv[1], [loggers.WandbLogger(pathlib.Path(sys.argv[1]), {})])\n"
        "output.metrics(1, train_loss=2.0)\n"
        "output.close()\n"
    )
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.perf_counter() - began < 15
    assert done.returncode == 0 and done.stdout == ""
    assert_one_warning(done.stderr, "wandb")
    assert len(run_dir.read_metrics(tmp_path)) == 1
