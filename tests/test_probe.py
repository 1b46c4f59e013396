"""Small tasks with known answers, and the verdicts. Alone: uv run pytest tests/test_probe.py"""

import dataclasses
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_basics import swap
from llm_basics.analysis import run_summary
from llm_basics.cli import commands
from llm_basics.core import config, model, trainer
from llm_basics.core import functional as F
from llm_basics.learn import probe, probe_tasks
from llm_basics.runs import run_dir

ANSWERED = [name for name in probe_tasks.TASKS if name != "markov"]
ZERO = torch.zeros(())
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(task, row):
    return [task.symbols[token] for token in row]


def some(name, n=40):
    task = probe_tasks.TASKS[name](0)
    return task, task.draw(n, np.random.default_rng(5)).tolist()


# --------------------------------------------------------------------------------------------------
# Sequences


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("reverse", lambda text: "".join(reversed(text))),
        ("invert", lambda text: text.translate(str.maketrans(LETTERS, LETTERS[::-1]))),
        ("copy", str),
    ],
)
def test_tokens_after_sep_are_the_answer(name, answer):
    task, rows = some(name)
    texts = set()
    for row in rows:
        bos, *x, sep = words(task, row)[:11]
        assert (bos, sep) == ("[BOS]", "[SEP]")
        assert "".join(words(task, row)[11:]) == answer("".join(x))
        texts.add("".join(x))
    assert len(texts) == 40 and set("".join(texts)) == set(LETTERS)
    assert task.answers == tuple(range(11, 20))


def test_sums_are_modulo_31():
    task, rows = some("addition", 2000)
    for row in rows:
        bos, a, b, sep, c = words(task, row)
        assert (bos, sep) == ("[BOS]", "[SEP]") and (int(a) + int(b) - int(c)) % 31 == 0
    assert {row[4] for row in rows} == set(range(31))


def test_induction_repeats_each_pair():
    task, rows = some("induction")
    for row in rows:
        assert sorted(row[:16]) == sorted(row[16:]) and len(set(row[:16])) == 16
        for position in task.answers:
            first = row.index(row[position - 1])
            assert first < 16 and row[position] == row[first + 1]
    # in another order
    assert not any(row[:16] == row[16:] for row in rows)


@pytest.mark.parametrize("name", probe_tasks.TASKS)
def test_tokens_fit_the_model(name):
    task, rows = some(name)
    assert {len(row) for row in rows} == {task.model.context_length + 1}
    assert max(max(row) for row in rows) < task.model.vocab_size == len(task.symbols)
    assert list(task.losses.values()) == sorted(task.losses.values())


@pytest.mark.parametrize("name", probe_tasks.TASKS)
def test_held_out_sequences_are_distinct_and_never_trained_on(name):
    task = probe_tasks.TASKS[name](0)
    held_out = probe_tasks.hold_out(task, 3)
    keys = {task.key(row) for row in held_out.tolist()}
    assert len(held_out) == len(keys) == task.n_held_out
    for batch in itertools.islice(probe_tasks.fresh(task, held_out, 3), 20):
        assert keys.isdisjoint(task.key(row) for row in batch.tolist())


def test_held_out_sequences_are_excluded_from_training():
    task = probe_tasks.addition(0)
    trained = next(probe_tasks.fresh(task, probe_tasks.hold_out(task, 0), 0)).tolist()
    drawn = task.draw(task.train.batch_size, np.random.default_rng((0, 1))).tolist()
    held_out = {tuple(row[1:3]) for row in probe_tasks.hold_out(task, 0).tolist()}
    held_out |= {(b, a) for a, b in held_out}
    assert trained == [row for row in drawn if tuple(row[1:3]) not in held_out]
    assert 0 < len(trained) < len(drawn)


def test_a_seed_determines_the_sequences():
    task = probe_tasks.reverse(0)
    for make in (
        probe_tasks.hold_out,
        lambda task, seed: next(probe_tasks.fresh(task, np.empty((0, 20), int), seed)),
    ):
        assert np.array_equal(make(task, 1), make(task, 1))
        assert not np.array_equal(make(task, 1), make(task, 2))


def test_an_example_shows_its_answers():
    row = [26, *range(9), 27, *reversed(range(9))]
    assert probe_tasks.reverse(0).show(row).splitlines() == [
        "input     [BOS] a b c d e f g h i [SEP] _ _ _ _ _ _ _ _ _",
        "expected                                i h g f e d c b a",
    ]


# --------------------------------------------------------------------------------------------------
# A source of known entropy


def test_entropy_of_two_states_matches_the_formula():
    a, b = 0.1, 0.4
    source = probe_tasks.Source(np.array([[1 - a, a], [b, 1 - b]]))

    def h(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    pi = b / (a + b)
    np.testing.assert_allclose(source.stationary(), [pi, 1 - pi])
    assert source.entropy_rate() == pytest.approx(pi * h(a) + (1 - pi) * h(b))
    assert source.unigram_entropy() == pytest.approx(h(pi))
    assert source.best_accuracy() == pytest.approx(pi * 0.9 + (1 - pi) * 0.6)


def test_zero_probabilities_add_no_entropy():
    assert probe_tasks.Source(np.array([[0.0, 1.0], [1.0, 0.0]])).entropy_rate() == 0


def test_a_simulation_has_the_entropies_of_the_source():
    source = probe_tasks.markov(0).source
    text = source.draw(2000, 100, np.random.default_rng(0))
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (text[:, :-1].ravel(), text[:, 1:].ravel()), 1)
    shares = pairs / pairs.sum()
    singles = shares.sum(axis=1)
    conditional = -(shares[pairs > 0] * np.log((shares / singles[:, None])[pairs > 0])).sum()
    assert source.entropy_rate() == pytest.approx(conditional, abs=0.01)
    assert source.unigram_entropy() == pytest.approx(-(singles * np.log(singles)).sum(), abs=0.01)
    assert source.surprisal(text).mean() == pytest.approx(source.entropy_rate(), abs=0.01)
    # the first token is drawn from the stationary distribution
    np.testing.assert_allclose(np.bincount(text[:, 0]) / 2000, source.stationary(), atol=0.03)


# --------------------------------------------------------------------------------------------------
# Measurements


@pytest.mark.parametrize("name", probe_tasks.TASKS)
def test_only_answers_count_in_the_loss(name):
    task, rows = some(name)
    inputs, targets = probe.collate(task, np.array(rows))
    assert inputs.tolist() == [row[:-1] for row in rows]
    for row, wanted in zip(rows, targets.tolist(), strict=True):
        assert wanted == [row[i] if i in task.answers else -100 for i in range(1, len(row))]
    logits = torch.randn(*targets.shape, task.model.vocab_size, requires_grad=True)
    F.cross_entropy(logits, targets).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, targets != -100)


class Oracle(torch.nn.Module):
    """Knows the sequences, and predicts the next token of a known prefix with certainty."""

    def __init__(self, rows, size, peeks=False):
        super().__init__()
        self.rows, self.size, self.peeks = rows, size, peeks

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.size)
        for i, given in enumerate(tokens.tolist()):
            for position in range(1, len(given) + 1):
                if self.peeks:
                    token = given[position] if position < len(given) else 0
                else:
                    known = [row for row in self.rows if row[:position] == given[:position]]
                    token = known[0][position] if known else 0
                logits[i, position - 1, token] = 50
        return logits


@pytest.mark.parametrize("name", ANSWERED)
def test_an_oracle_passes(name):
    task, rows = some(name)
    found = probe.measure(Oracle(rows, len(task.symbols)), task, np.array(rows), task.train.steps)
    assert (found.accuracy, found.exact, found.leak) == (1, 1, 0) and found.loss < 1e-6
    n = task.n_held_out
    assert probe.judge(task, found) == (True, f"{n} of {n} held-out sequences exact")


@pytest.mark.parametrize("name", ["reverse", "induction"])
def test_a_leak_is_detected(name):
    task, rows = some(name)
    found = probe.measure(Oracle(rows, len(task.symbols), peeks=True), task, np.array(rows))
    assert found.leak == 1 and found.exact == 0
    passed, verdict = probe.judge(task, found)
    assert not passed and "sees its targets" in verdict


def test_answers_are_decoded_from_earlier_tokens_only():
    task, rows = some("induction", 3)
    lm = model.TransformerLM(task.model)
    tokens = torch.tensor(rows)
    expected = tokens.clone()
    for row in expected:
        for position in task.answers:
            row[position] = lm(row[:position])[-1].argmax()
    assert torch.equal(probe.answer(lm, tokens, task.answers), expected)
    garbled = tokens.clone()
    garbled[:, list(task.answers)] = 0
    assert torch.equal(probe.answer(lm, garbled, task.answers), expected)


# --------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"exact": 0.998, "accuracy": 0.999},
            "499 of 500 .* partly learned",
        ),
        ({"exact": 0.0, "accuracy": 0.04}, "no better than guessing"),
        ({"exact": 0.0, "leak": 0.2, "accuracy": 0.04}, "sees its targets"),
        ({"exact": 0.0, "accuracy": 0.05, "train_loss": 0.01}, "memorized"),
    ],
)
def test_a_failure_names_a_probable_cause(found, message):
    task = probe_tasks.reverse(0)
    last = probe.Measurement(**({"step": task.train.steps, "train_loss": 3.2, "loss": 3.2} | found))
    passed, verdict = probe.judge(task, last)
    assert not passed
    assert re.search(message, verdict), verdict


@pytest.mark.parametrize(
    ("above", "passed", "message"),
    [
        (-0.3, False, "The model sees its targets (a leak)"),
        (-0.021, False, "a leak"),
        (-0.019, True, "entropy rate"),
        (0.01, True, "entropy rate"),
        (0.1, False, "partly learned"),
    ],
)
def test_a_loss_below_the_entropy_rate_is_a_leak(above, passed, message):
    task = probe_tasks.markov(0)
    loss = task.source.entropy_rate() + above
    last = probe.Measurement(task.train.steps, loss, loss, 0.4, noise=0.02)
    found, verdict = probe.judge(task, last)
    assert found == passed and message in verdict


@pytest.mark.parametrize(("line", "message"), [(1, "token frequencies"), (2, "nothing was learned")])
def test_a_loss_at_a_baseline_is_explained(line, message):
    task = probe_tasks.markov(0)
    loss = list(task.losses.values())[line]
    passed, verdict = probe.judge(task, probe.Measurement(10, loss, loss, 0.1))
    assert not passed and message in verdict
    assert verdict.endswith(f"(only 10 of {task.train.steps} steps)")


# --------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def small(monkeypatch):
    """The tasks with small models and batches."""

    def shrink(make):
        def made(seed):
            task = make(seed)
            shape = dataclasses.replace(task.model, d_model=32, n_layers=1, n_heads=2, d_ff=32)
            train = dataclasses.replace(task.train, batch_size=8, lr=1e-2, warmup_steps=5)
            return dataclasses.replace(task, model=shape, train=train, n_held_out=50)

        return made

    monkeypatch.setattr(
        probe_tasks, "TASKS", {name: shrink(make) for name, make in probe_tasks.TASKS.items()}
    )
    # several measurements would take most of the time
    monkeypatch.setattr(probe, "N_MEASUREMENTS", 1)


def run(tmp_path, capsys, *mine, **options):
    """Exit status and output; `mine` is the source of a file with pieces."""
    if mine:
        path = tmp_path / "mine.py"
        path.write_text("import torch\n" + mine[0])
        options["mine"] = str(path)
    pieces = "functional.causal_mask functional.cross_entropy functional.softmax".split()
    with swap.replaced({piece: swap.reference(piece) for piece in pieces}):
        status = probe.main(commands.ProbeConfig(out=str(tmp_path / "out"), **options))
    return status, capsys.readouterr().out


def test_a_few_steps_fail_and_are_plotted(small, tmp_path, capsys):
    status, out = run(tmp_path, capsys, task="copy", steps=3)
    assert status == 1
    assert "pieces    reference code" in out
    assert "failed: 0 of 50 held-out sequences exact" in out and "(only 3 of" in out
    figure = tmp_path / "out" / "copy.png"
    assert f"figure    {figure}" in out and figure.read_bytes().startswith(b"\x89PNG")


def test_a_recorded_task_is_a_run_with_its_known_losses(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = commands.ProbeConfig("markov", steps=5, out=str(tmp_path / "figures"), record=True)
    probe.main(options)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run       runs/{folder.name}" in capsys.readouterr().out
    source = probe_tasks.TASKS["markov"](0).source
    baselines = run_dir.read_recorded(folder)[run_dir.BASELINES]
    assert baselines["entropy rate"] == pytest.approx(source.entropy_rate())
    assert baselines["unigram entropy"] == pytest.approx(source.unigram_entropy())
    metrics = run_dir.read_metrics(folder)
    assert [m["step"] for m in metrics if "train_loss" in m] == [1, 2, 3, 4, 5]
    assert [m["step"] for m in metrics if "val_loss" in m][-1] == 5
    assert run_summary.summarize(folder).steps == 5
    assert run_summary.details(folder).baselines == pytest.approx(baselines)


@pytest.mark.parametrize(("steps", "ends_at"), [(None, 120), (90, 24)])
def test_training_ends_once_answers_stay_right(monkeypatch, steps, ends_at):
    """At a multiple of the interval of measurements, 1/20 of the steps: wrong, right, wrong, right, ..."""
    exact = iter([0.9, 1.0, 0.9, *(1.0,) * 9])
    measured = []

    def measure(model, task, held_out, step, train_loss):
        # the last one is repeated with all sequences
        measured.append(len(held_out))
        return probe.Measurement(step, 0.0, 0.0, 1.0, exact=next(exact))

    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(trainer, "train_step", lambda *_: trainer.StepResult(ZERO, ZERO, 0.1))
    task = dataclasses.replace(probe_tasks.copy(0), train=config.TrainConfig(steps=400))
    outcome = probe.learn(task, 0, steps, log=lambda line: None)
    assert outcome.label == "passed" and len(outcome.train_losses) == ends_at
    assert measured[-1] == 500 and set(measured[:-1]) == {100}


def test_a_pass_on_some_sequences_alone_does_not_end_training(monkeypatch):
    def measure(model, task, held_out, step, train_loss):
        return probe.Measurement(step, 0.0, 0.0, 1.0, exact=1.0 if len(held_out) == 100 else 0.9)

    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(trainer, "train_step", lambda *_: trainer.StepResult(ZERO, ZERO, 0.1))
    task = dataclasses.replace(probe_tasks.copy(0), train=config.TrainConfig(steps=40))
    outcome = probe.learn(task, 0, log=lambda line: None)
    assert outcome.label == "failed" and len(outcome.train_losses) == 40


def test_a_slow_machine_has_fewer_steps_and_no_failure(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "N_MEASUREMENTS", 100)
    monkeypatch.setattr(probe, "MOST_SECONDS", 0.0)
    status, out = run(tmp_path, capsys, task="copy")
    assert status == 1 and "step     3 of 3 " in out
    assert (
        "undecided: " in out and "(only 3 of 300 steps); a minute is over, train on with --steps 300" in out
    )


def test_all_runs_every_task(small, tmp_path, capsys):
    status, out = run(tmp_path, capsys, steps=1)
    assert status == 1 and out.endswith("0 of 6 tasks passed\n")
    first = "tasks     reverse, invert, copy, addition, induction, markov: at most a minute each"
    assert f"\n{first}; for one, name it\nfigures   {tmp_path}/out/\n" in out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(probe_tasks.TASKS)


def test_attention_without_a_causal_mask_is_a_leak(small, tmp_path, capsys):
    status, out = run(
        tmp_path,
        capsys,
        "def causal_mask(queries, keys, offset=0, device=None):\n"
        "    return torch.ones(queries, keys, dtype=torch.bool, device=device)\n",
        task="markov",
        steps=80,
    )
    assert status == 1
    assert "pieces    causal_mask from mine.py" in out
    assert "The model sees its targets (a leak): is the causal mask applied" in out


def test_a_uniform_softmax_fails(small, tmp_path, capsys):
    status, out = run(
        tmp_path,
        capsys,
        "def softmax(x, dim=-1, temperature=1.0):\n    return x.isfinite() / x.isfinite().sum(dim, True)\n",
        task="copy",
        steps=60,
    )
    assert status == 1 and "failed: " in out and "0 of 50 held-out sequences exact" in out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise IndexError('index -100 is out of bounds')",
            "failed: IndexError: index -100 is out of bounds (mine.py:",
        ),
        ("return logits.sum() * float('nan')", "failed: step 1: loss nan"),
    ],
)
def test_a_piece_that_raises_fails_the_task(small, tmp_path, capsys, body, message):
    code = (
        f"def cross_entropy(logits, targets, ignore_index=-100, z_loss=0.0, reduction='mean'):\n    {body}\n"
    )
    status, out = run(tmp_path, capsys, code, task="reverse", steps=3)
    assert status == 1 and message in out


def test_an_error_in_the_reference_is_raised(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "collate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, capsys, task="copy", steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "sorting"},
            "task must be reverse, invert, copy, addition, induction, markov or all, got sorting",
        ),
        ({"mine": "nowhere.py"}, "your pieces must be in a Python file, but there is no nowhere.py"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        probe.main(commands.ProbeConfig(out=str(tmp_path), **options))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_usage_errors_are_found_before_torch_is_imported(tmp_path):
    script = (
        "import runpy, sys\n"
        "sys.argv = ['probe', 'sorting']\n"
        "try:\n"
        "    runpy.run_module('llm_basics.probe', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2 False\n" and done.stderr.startswith("error: task must be")


@pytest.mark.slow
@pytest.mark.parametrize("name", probe_tasks.TASKS)
def test_the_reference_learns_every_task(tmp_path, capsys, name):
    status, out = run(tmp_path, capsys, task=name)
    assert status == 0, out
