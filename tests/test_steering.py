"""Options changed while a run trains, and the replay. Alone: uv run pytest tests/test_steering.py"""

import dataclasses
import json
import os

import pytest

from llm_basics.cli import commands, parse
from llm_basics.cli import steer as steer_command
from llm_basics.core import config
from llm_basics.runs import checkpoint, inbox, locks, run_dir, steering
from llm_basics.training import job, state

STEPS = 8


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    return config.Config(
        data=str(text),
        tokenizer="bytes",
        fast="off",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "run"),
        model=config.ModelConfig(
            vocab_size=257, context_length=16, d_model=16, n_layers=1, n_heads=2, dropout=0.1
        ),
        train=config.TrainConfig(
            steps=STEPS,
            batch_size=2,
            lr=1e-2,
            warmup_steps=2,
            log_every=1,
            eval_every=100,
            eval_batches=1,
            sample_every=0,
            sample_tokens=2,
            checkpoint_every=2,
            keep_checkpoints=0,
            device="cpu",
        ),
    )


@pytest.fixture
def commanded(monkeypatch):
    """A dictionary to fill: the words that are sent to the run after a step, or what is called then."""
    plan = {}
    advance = state.TrainingState.advance

    def advance_and_send(training):
        advance(training)
        match plan.pop(training.step, None):
            case str(words):
                steering.send(training.options.run_dir, *steering.parse(words.split()))
            case None:
                pass
            case call:
                call(training.options.run_dir)

    monkeypatch.setattr(state.TrainingState, "advance", advance_and_send)
    return plan


def train(*arguments):
    return job.main(parse.train_options(list(map(str, arguments))))


def weights(folder, step=STEPS):
    return checkpoint.weights_sha256(run_dir.checkpoint_path(folder, step))


def events(folder, *kinds):
    return [event for event in run_dir.read_events(folder) if event["event"] in kinds]


def rates(folder):
    return {entry["step"]: entry["lr"] for entry in run_dir.read_metrics(folder) if "lr" in entry}


def test_a_command_takes_effect_at_the_next_step_and_is_recorded(options, commanded, capsys):
    commanded |= {3: "train.lr=1e-3 train.eval_every=2 evaluate", 5: "sample save", 6: "train.lr=1e-3"}
    assert job.main(options) == 0
    folder = options.run_dir
    first, second, third = events(folder, "steered")
    assert (first["step"], first["do"]) == (3, ["evaluate"])
    assert first["changed"] == {"train.lr": [1e-2, 1e-3], "train.eval_every": [100, 2]}
    assert (second["step"], second["do"], second["changed"]) == (5, ["sample", "save"], {})
    assert third["changed"] == {}
    shown = "step 3: train.eval_every 100 -> 2, train.lr 0.01 -> 0.001, evaluate, by command\n"
    assert shown in capsys.readouterr().out
    lr = rates(folder)
    assert lr[3] > 5e-3 and max(lr[step] for step in range(4, STEPS + 1)) < 1e-3
    evaluated = [entry["step"] for entry in run_dir.read_metrics(folder) if "val_loss" in entry]
    assert evaluated == [3, 4, 6, STEPS]
    assert [entry["step"] for entry in run_dir.read_samples(folder)] == [5, STEPS]
    assert 5 in [event["step"] for event in events(folder, "checkpoint")]
    # config.json and checkpoints have the values in effect
    assert run_dir.read_config(folder)["train"]["lr"] == 1e-3
    assert run_dir.read_held_out(folder) is not None
    saved = {step: checkpoint.read_about(run_dir.checkpoint_path(folder, step)) for step in (2, 4)}
    assert [saved[step]["config"]["train"]["lr"] for step in (2, 4)] == [1e-2, 1e-3]


def test_a_replay_has_the_same_weights(options, commanded, tmp_path, capsys):
    commanded |= {2: "train.lr=2e-3 sample", 5: "train.lr=2e-2 train.min_lr=1e-2"}
    assert job.main(options) == 0
    assert train("--replay", options.run_dir, "--run_dir", tmp_path / "again") == 0
    assert weights(tmp_path / "again") == weights(options.run_dir)
    assert rates(tmp_path / "again") == rates(options.run_dir)
    assert "replay: the weights equal those of" in capsys.readouterr().out
    (compared,) = events(tmp_path / "again", "replayed")
    assert compared["step"] == STEPS and compared["sha256"] == compared["expected"]
    # unsteered, the weights are others
    assert job.main(dataclasses.replace(options, run_dir=str(tmp_path / "plain"))) == 0
    assert weights(tmp_path / "plain") != weights(options.run_dir)


def test_a_replay_that_differs_is_reported(options, commanded, tmp_path, capsys):
    commanded |= {2: "train.lr=2e-3"}
    assert job.main(options) == 0
    recorded = tmp_path / "run" / run_dir.EVENTS
    recorded.write_text(recorded.read_text().replace("0.002]", "0.003]"))
    assert train("--replay", options.run_dir, "--run_dir", tmp_path / "again") == job.NOT_SAME
    assert "warning: the weights differ from those of" in capsys.readouterr().out


def test_a_resume_keeps_the_values_and_a_replay_repeats_it(options, commanded, tmp_path):
    """Steered, stopped by command, resumed with other options, steered again."""
    commanded |= {2: "train.lr=2e-3", 5: "stop", 6: "train.max_grad_norm=0.1"}
    assert job.main(options) == 128 + 15
    assert [event["step"] for event in events(options.run_dir, "stopped")] == [5]
    assert train("--resume", options.run_dir, "--train.steps", "10", "--train.min_lr=1e-3") == 0
    (resumed,) = events(options.run_dir, "resumed")
    assert resumed["step"] == 5
    assert resumed["changed"] == {"train.steps": [STEPS, 10], "train.min_lr": [None, 1e-3]}
    assert run_dir.read_config(options.run_dir)["train"]["lr"] == 2e-3
    assert train("--replay", options.run_dir, "--run_dir", tmp_path / "again") == 0
    assert weights(tmp_path / "again", 10) == weights(options.run_dir, 10)
    assert rates(tmp_path / "again") == rates(options.run_dir)


def test_a_stopped_replay_is_resumed(options, commanded, tmp_path):
    commanded |= {2: "train.lr=2e-3", 6: "train.lr=3e-3"}
    assert job.main(options) == 0
    commanded |= {4: "stop"}
    assert train("--replay", options.run_dir, "--run_dir", tmp_path / "again") == 128 + 15
    assert train("--resume", tmp_path / "again") == 0
    assert weights(tmp_path / "again") == weights(options.run_dir)
    assert events(tmp_path / "again", "replayed")[0]["step"] == STEPS
    # a replay of the replay
    assert train("--replay", tmp_path / "again", "--run_dir", tmp_path / "third") == 0
    assert weights(tmp_path / "third") == weights(options.run_dir)


def test_changes_after_the_checkpoint_resumed_from_are_repeated(options, commanded, tmp_path, capsys):
    """As after a process that was killed, which saved nothing on its way out."""
    commanded |= {1: "train.lr=2e-3", 5: "train.lr=3e-3"}
    assert job.main(options) == 0
    whole = weights(options.run_dir)
    for path in run_dir.checkpoints(options.run_dir):
        if path > run_dir.checkpoint_path(options.run_dir, 4):
            path.unlink()
    capsys.readouterr()
    assert train("--resume", options.run_dir) == 0
    out = capsys.readouterr().out
    assert "bit for bit as if never stopped" in out
    assert "step 5: train.lr 0.002 -> 0.003, as recorded" in out
    assert weights(options.run_dir) == whole
    # what is given on the command line replaces them
    for path in run_dir.checkpoints(options.run_dir)[:3]:
        path.unlink()
    assert train("--resume", options.run_dir, "--train.lr=1e-3") == 0
    assert [change.value for change in steering.read_changes(options.run_dir)] == [2e-3, 1e-3]
    assert max(rates(options.run_dir)[step] for step in (5, 6, 7, 8)) <= 1e-3


def test_newer_commands_and_options_replace_recorded_changes(options, commanded, capsys):
    commanded |= {5: "train.lr=3e-2 train.min_lr=2e-2"}
    assert job.main(options) == 0
    for path in run_dir.checkpoints(options.run_dir)[:3]:
        path.unlink()
    commanded |= {3: "train.lr=4e-3"}
    assert train("--resume", options.run_dir) == 0
    changes = [(change.step, change.name, change.value) for change in steering.read_changes(options.run_dir)]
    # the lower lr does not allow the recorded min_lr any more
    assert changes == [(3, "train.lr", 4e-3), (5, "train.min_lr", 2e-2), (5, "train.min_lr", None)]
    assert "step 5 was refused: train.min_lr must be at most lr (0.004)" in capsys.readouterr().out
    assert run_dir.read_config(options.run_dir)["train"]["lr"] == 4e-3
    assert train("--resume", options.run_dir, "--train.steps=9") == 0
    assert train("--replay", options.run_dir, "--run_dir", f"{options.run_dir}-again") == 0
    assert weights(f"{options.run_dir}-again", 9) == weights(options.run_dir, 9)


def test_a_run_with_changes_built_into_its_data_is_not_replayed(options, commanded, capsys):
    commanded |= {2: "stop"}
    assert job.main(options) == 128 + 15
    assert train("--resume", options.run_dir, "--train.batch_size=4") == 0
    with pytest.raises(SystemExit) as stop:
        parse.train_options(["--replay", options.run_dir])
    assert stop.value.code == 2
    assert "resumed after step 2 with train.batch_size 4 instead of 2" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--resume", "--config", "--init_from"])
def test_replay_is_used_alone(other, capsys):
    with pytest.raises(SystemExit):
        parse.train_options(["--replay", "a", other, "b"])
    assert f"--replay cannot be combined with {other}" in capsys.readouterr().err


def test_a_replay_needs_the_same_text(options, tmp_path, capsys):
    assert job.main(options) == 0
    (tmp_path / "text.txt").write_text("".join(f"{i} plus {i} is {i + i}.\n" for i in range(200)))
    with pytest.raises(SystemExit) as stop:
        train("--replay", options.run_dir, "--run_dir", tmp_path / "again")
    assert stop.value.code == 2 and "have changed" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Refused commands

WRONG = [
    ('{"set": {"train.lr": -1}}', "train.lr must be at least 0"),
    ('{"set": {"train.lr": NaN}}', "train.lr must be at least 0 and finite"),
    ('{"set": {"train.lr": "much"}}', "train.lr must be float"),
    ('{"set": {"train.lr": {"a": 1}}}', "train.lr must be float"),
    ('{"set": {"train.min_lr": 1}}', "train.min_lr must be at most lr"),
    ('{"set": {"train.eval_every": 0}}', "train.eval_every must be at least 1"),
    ('{"set": {"train.batch_size": 8}}', "train.batch_size cannot be changed while a run trains"),
    ('{"do": ["jump"]}', "an action must be one of"),
    ('{"do": [["save"]]}', "an action must be one of"),
    ('{"do": "save"}', "a command must set an option"),
    ("{}", "a command must set an option"),
    ("[1]", "a command must be an object"),
    ('{"set": ', "must be JSON"),
    ("[" * 20_000, "must be JSON"),
    ("\x00\ufffd", "must be JSON"),
]


def test_wrong_commands_change_nothing_and_the_reason_is_recorded(options, commanded, tmp_path):
    def write(folder):
        with open(tmp_path / "run" / inbox.COMMANDS, "a") as file:
            file.write("\n".join(line for line, _ in WRONG) + "\n")

    commanded |= {2: write}
    assert job.main(options) == 0
    refused = events(options.run_dir, "refused")
    assert [event["step"] for event in refused] == len(WRONG) * [2]
    for event, (line, reason) in zip(refused, WRONG, strict=True):
        assert reason in event["reason"], line
    assert not events(options.run_dir, "steered")
    assert run_dir.read_config(options.run_dir)["train"] == json.loads(
        json.dumps(dataclasses.asdict(options.train))
    )


def test_commands_to_an_earlier_attempt_are_not_obeyed(options, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    inbox.send(options.run_dir, {"do": ["stop"]})
    with pytest.raises(ValueError, match="must be training to be steered"):
        steering.send(options.run_dir, {"train.lr": 1})
    output = run_dir.RunDir(options.run_dir)
    assert output.inbox.lines() == []
    steering.send(options.run_dir, {}, ["save"])
    (line,) = output.inbox.lines()
    assert json.loads(line)["do"] == ["save"] and output.inbox.lines() == []
    output.close()


def test_the_inbox_reads_whole_lines_and_is_bounded(tmp_path):
    box = inbox.Inbox(tmp_path)
    path = tmp_path / inbox.COMMANDS
    path.write_text('{"a": 1}\n{"torn')
    assert box.lines() == ['{"a": 1}']
    assert box.lines() == []
    inbox.send(tmp_path, {"b": 2})
    assert box.lines() == ['{"torn', '{"b": 2}']
    path.write_text("x\n")  # replaced by a shorter one
    assert box.lines() == ["x"]
    path.unlink()
    assert box.lines() == []
    path.write_bytes(b"y" * (inbox.MAX_BYTES + 5) + b"\n\xff\n")
    assert [len(line) for line in box.lines()] == [inbox.MAX_BYTES]
    assert box.lines() == ["yyyyy", "\ufffd"]


def test_without_a_command_a_step_costs_one_stat(tmp_path, monkeypatch):
    box, calls = inbox.Inbox(tmp_path), []
    monkeypatch.setattr(inbox.os, "stat", lambda path: calls.append(path) or (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr("builtins.open", lambda *given: pytest.fail("opened"))
    assert box.lines() == [] and len(calls) == 1


# --------------------------------------------------------------------------------------------------
# The command


def steer(folder, *words, wait_seconds=60.0):
    return steer_command.main(commands.SteerConfig(str(folder), words, wait_seconds))


def test_the_command_prints_the_answer_of_the_run(tmp_path, monkeypatch, capsys):
    output = run_dir.RunDir(tmp_path)

    def answer(seconds):
        command = json.loads(output.inbox.lines()[0])
        if command["set"].get("train.lr") == "1e-3":
            output.event(4, "steered", id=command["id"], changed={"train.lr": [1e-2, 1e-3]}, do=command["do"])
        elif command["set"]:
            output.event(
                4, "refused", id=command["id"], reason="train.lr must be at least 0 and finite, got inf"
            )
        else:
            output.close()

    monkeypatch.setattr(steering.time, "sleep", answer)
    steer(tmp_path, "train.lr=1e-3", "stop")
    assert capsys.readouterr().out == (
        f"step 4: train.lr 0.01 -> 0.001, stop\nresume with --resume {tmp_path}\n"
    )
    with pytest.raises(SystemExit) as stop:
        steer(tmp_path, "train.lr=.inf")
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: train.lr must be at least 0 and finite, got inf; nothing was changed\n"
    )
    steer(tmp_path, "save", wait_seconds=0.0)
    assert "within 0 s, see events.jsonl" in capsys.readouterr().out
    output.inbox.lines()
    with pytest.raises(SystemExit):
        steer(tmp_path, "save")
    assert "ended before it read the command" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        steer(tmp_path, "save")
    assert stop.value.code == 2 and "must be training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "a command must set an option"),
        (("train.seed=1",), "train.seed cannot be changed while a run trains; these can: train.lr"),
        (("jump",), "an action must be one of evaluate, sample, save, stop, got jump"),
        (("train.lr=[",), "train.lr must be a number, got '['"),
        (("train.lr=2026-01-01",), "train.lr must be a number, got '2026-01-01'"),
    ],
)
def test_wrong_words_are_errors(words, error, tmp_path, capsys):
    with run_dir.contextlib.closing(run_dir.RunDir(tmp_path)), pytest.raises(SystemExit) as stop:
        steer(tmp_path, *words)
    assert stop.value.code == 2 and error in capsys.readouterr().err
    assert not (tmp_path / inbox.COMMANDS).exists()


def test_a_folder_has_an_owner_while_a_process_writes_to_it(tmp_path, monkeypatch):
    assert locks.owner(tmp_path) is None
    with locks.locked(tmp_path):
        assert locks.owner(tmp_path) == os.getpid()
    assert locks.owner(tmp_path) is None
    # left by a killed process, whose id another one has
    for content in (b"1\n", b"%d\n" % os.getpid()):
        (tmp_path / "lock").write_bytes(content)
        assert locks.owner(tmp_path) is None
    # where no process lives, nothing is locked: a run that begins would meet that lock
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: pytest.fail("locked"))
    for content in (b"999999999\n", b"-1\n", b"x", b""):
        (tmp_path / "lock").write_bytes(content)
        assert locks.owner(tmp_path) is None


# --------------------------------------------------------------------------------------------------
# Recorded changes


def test_a_later_record_at_an_earlier_step_replaces_changes(tmp_path):
    output = run_dir.RunDir(tmp_path)
    output.event(2, "steered", changed={"train.lr": [1.0, 2.0]})
    output.event(6, "steered", changed={"train.lr": [2.0, 3.0], "train.eval_every": [5, 7]})
    output.event(4, "resumed", changed={"train.lr": [2.0, 4.0]})
    output.close()
    changes = steering.read_changes(tmp_path)
    assert [(change.step, change.name, change.value) for change in changes] == [
        (2, "train.lr", 2.0),
        (4, "train.lr", 4.0),
        (6, "train.eval_every", 7),
    ]
    now = steering.with_values(config.Config(), {"train.lr": 4.0, "train.eval_every": 7}, "here")
    values = {}
    for step in (-1, 2, 5, 6):
        then = steering.at_step(now, changes, step)
        values[step] = then.train.lr, then.train.eval_every
    assert values == {-1: (1.0, 5), 2: (2.0, 5), 5: (4.0, 5), 6: (4.0, 7)}
    (tmp_path / run_dir.EVENTS).write_text('{"event": "steered", "step": 3, "changed": {"train.lr": 1}}\n')
    with pytest.raises(ValueError, match="must hold events with step and changed"):
        steering.read_changes(tmp_path)
