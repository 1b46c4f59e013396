"""Train a small model on a task with known answers and judge the result, within a minute per task."""

import dataclasses
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from matplotlib import figure
from torch import Tensor, nn

from llm_basics import swap
from llm_basics.analysis import figures
from llm_basics.cli import commands, parse
from llm_basics.core import dataloader, files, trainer
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.learn import probe_tasks
from llm_basics.runs import run_dir, stopwatch

# number of measurements during training, and of their held-out sequences; the last one uses all
N_MEASUREMENTS, N_SEQUENCES = 20, 100

# training ends after this many passed measurements in a row, and after about this many seconds
N_PASSED, MOST_SECONDS = 3, 60.0

# maximum gap to the entropy rate, in nats
LOSS_TOLERANCE = 0.03

# rounding of equal logits changes the answers of fewer sequences than this fraction
MAX_LEAK = 0.1


def collate(
    task: probe_tasks.Task, sequences: Int[np.ndarray, "n length"]
) -> tuple[Int[Tensor, "n seq"], Int[Tensor, "n seq"]]:
    """Inputs, and next tokens as targets, with all but the answers masked."""
    tokens = torch.from_numpy(sequences).long()
    is_answer = torch.zeros(tokens.shape[-1], dtype=torch.bool)
    is_answer[list(task.answers)] = True
    return tokens[:, :-1], tokens.masked_fill(~is_answer, dataloader.IGNORE_INDEX)[:, 1:]


# --------------------------------------------------------------------------------------------------
# Measurements


@dataclass(frozen=True)
class Measurement:
    """Metrics on the held-out sequences after a step."""

    step: int
    train_loss: float
    """Loss of the batch of that step."""
    loss: float
    """Held-out loss, in nats per answer."""
    accuracy: float
    """Fraction of correct answers."""
    exact: float = math.nan
    """Fraction of sequences with all answers correct, decoded one token at a time."""
    leak: float = 0.0
    """Increase of this fraction, without the last answer, if the answers are in the input."""
    noise: float = 0.0
    """Four standard errors of the loss."""


@torch.no_grad()
def answer(
    model: nn.Module, sequences: Int[Tensor, "n length"], positions: tuple[int, ...]
) -> Int[Tensor, "n length"]:
    """The sequences with the model's argmax tokens at `positions`, decoded one at a time."""
    tokens = sequences.clone()
    for position in positions:
        tokens[:, position] = model(tokens[:, :position])[:, -1].argmax(-1)
    return tokens


@torch.no_grad()
def measure(
    model: nn.Module,
    task: probe_tasks.Task,
    held_out: Int[np.ndarray, "n length"],
    step: int = 0,
    train_loss: float = math.nan,
) -> Measurement:
    """Measure `model` on `held_out`."""
    was_training = model.training
    model.eval()
    inputs, targets = collate(task, held_out)
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets).item()
    positions = list(task.answers)
    expected = torch.from_numpy(held_out).long()[:, positions]
    in_one_pass = logits.argmax(-1)[:, [position - 1 for position in positions]] == expected
    if task.source is not None:
        # over sequences, since the tokens of one sequence are not independent
        surprisals = task.source.surprisal(held_out).mean(axis=1)
        noise = 4 * float(surprisals.std()) / math.sqrt(len(surprisals))
        measured = Measurement(step, train_loss, loss, in_one_pass.float().mean().item(), noise=noise)
    else:
        sequences = torch.from_numpy(held_out).long()
        decoded = answer(model, sequences, task.answers)[:, positions] == expected
        accuracy, exact = decoded.float().mean().item(), decoded.all(-1).float().mean().item()
        # the last answer is not among the inputs
        seeing, blind = (each[:, :-1].all(-1).float().mean().item() for each in (in_one_pass, decoded))
        measured = Measurement(step, train_loss, loss, accuracy, exact, seeing - blind)
    model.train(was_training)
    return measured


# --------------------------------------------------------------------------------------------------
# Verdicts


def judge(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Whether a task was learned; if not, the probable cause."""
    passed, why = (judge_answers if task.source is None else judge_loss)(task, last)
    if not passed and last.step < task.train.steps:
        why += f" (only {last.step} of {task.train.steps} steps)"
    return passed, why


def judge_answers(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Passed if every held-out sequence is exact, or the fraction that the task requires.

    A causal model gives the same answers whether or not they are in its input, so a difference is a leak.
    """
    n_exact = round(last.exact * task.n_held_out)
    counted = f"{n_exact} of {task.n_held_out} held-out sequences exact"
    if n_exact >= task.needed * task.n_held_out:
        return True, counted
    score = f"{counted}, {last.accuracy:.1%} of answers correct"
    if last.leak > MAX_LEAK:
        return False, (
            f"{score}; {last.leak:.1%} more sequences are correct with the answers in the input. The "
            "model sees its targets (a leak): is the causal mask applied?"
        )
    guessing = list(task.losses.values())[-1]
    if last.train_loss < guessing / 10 and last.loss > guessing / 2:
        return False, (
            f"{score}; the loss is {last.train_loss:.3f} in training and {last.loss:.3f} on held-out "
            "sequences: memorized, not generalized; try more steps or more weight decay"
        )
    if last.accuracy < 2 * task.chance:
        return False, (
            f"{score}, chance {task.chance:.1%}: no better than guessing. Attention does not reach the other "
            "position (check mask and softmax), or no gradient reaches the weights"
        )
    return False, (
        f"{score}, chance {task.chance:.1%}: partly learned. If the loss still falls, train longer; if it is "
        "flat, check positions (RoPE), then the optimizer"
    )


def judge_loss(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Passed if the loss equals the entropy rate, within tolerance."""
    lowest, unigram, guessing = task.losses.values()
    score = f"held-out loss {last.loss:.3f}, entropy rate {lowest:.3f}"
    if last.loss < lowest - last.noise:
        return False, (
            f"{score}, the lower bound (noise {last.noise:.3f}). The model sees its targets (a leak): is the "
            "causal mask applied, are targets the next tokens?"
        )
    if last.loss < lowest + last.noise + LOSS_TOLERANCE:
        return True, score
    if last.loss > guessing - LOSS_TOLERANCE:
        return False, (
            f"{score}; a uniform guess has {guessing:.3f}, so nothing was learned: do gradients reach the "
            "weights, does the optimizer update them, are targets aligned with inputs?"
        )
    if last.loss > unigram - LOSS_TOLERANCE:
        return False, (
            f"{score}; token frequencies alone reach {unigram:.3f}, so the previous token is not used: do "
            "embeddings reach the output through the residual stream?"
        )
    return False, (
        f"{score}: partly learned. If the loss still falls, train longer; if it is flat, check the learning "
        "rate and the optimizer"
    )


# --------------------------------------------------------------------------------------------------
# Training


@dataclass
class Outcome:
    """Result of training on a task."""

    task: probe_tasks.Task
    train_losses: list[float] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    passed: bool = False
    verdict: str = ""
    out_of_time: bool = False

    @property
    def label(self) -> str:
        """The result in one word."""
        return "passed" if self.passed else "undecided" if self.out_of_time else "failed"


def learn(
    task: probe_tasks.Task, seed: int, steps: int | None = None, log: Callable[[str], None] = print
) -> Outcome:
    """Train a new model on a task and judge it.

    Training stops early when the answers are correct. On a slow machine it has fewer steps, with a schedule
    of that length, unless `steps` is given.
    """
    planned = steps or task.train.steps
    options = dataclasses.replace(
        task.train, steps=planned, warmup_steps=min(task.train.warmup_steps, planned // 10)
    )
    outcome, clock = Outcome(task), stopwatch.Stopwatch()
    held_out = probe_tasks.hold_out(task, seed)
    sequences = probe_tasks.fresh(task, held_out, seed)
    torch.manual_seed(seed)
    step = n_passed = 0
    try:
        model = models.TransformerLM(task.model)
        optimizer = trainer.make_optimizer(model, options)
        while step < options.steps and n_passed < N_PASSED:
            step += 1
            # one batch per step, so that the loss is the mean over its answers
            batch = collate(task, next(sequences))
            result = trainer.train_step(model, optimizer, [batch], step, options)
            trainer.check_finite(step, result.lr, result.train_loss, result.grad_norm)
            outcome.train_losses.append(result.train_loss.item())
            if step % max(1, planned // N_MEASUREMENTS) and step < options.steps:
                continue
            if steps is None:
                left = (MOST_SECONDS - clock.total()) * step / clock.total()
                options = dataclasses.replace(options, steps=min(planned, step + max(0, int(left))))
            measured = held_out if step == options.steps else held_out[:N_SEQUENCES]
            now = measure(model, task, measured, step, outcome.train_losses[-1])
            n_passed = n_passed + 1 if judge(task, now)[0] else 0
            if n_passed == N_PASSED and step < options.steps:
                now = measure(model, task, held_out, step, outcome.train_losses[-1])
                n_passed *= judge(task, now)[0]
            outcome.measured.append(now)
            log(f"{_progress(now, options.steps)}   {clock.total():.0f} s")
    except FloatingPointError as error:
        outcome.verdict = str(error)
        return outcome
    except Exception as error:
        # in the reference it is a bug
        if not swap.user_pieces():
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome.verdict = (
            f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno}); cross_entropy "
            f"must skip targets equal to ignore_index ({dataloader.IGNORE_INDEX}), which are not answers"
        )
        return outcome
    outcome.passed, outcome.verdict = judge(task, outcome.measured[-1])
    outcome.out_of_time = step < planned and not outcome.passed
    if outcome.out_of_time:
        outcome.verdict += f"; a minute is over, train on with --steps {planned}"
    return outcome


def _progress(now: Measurement, steps: int) -> str:
    exact = "" if math.isnan(now.exact) else f"   exact {now.exact:.3f}"
    return (
        f"step {now.step:5} of {steps}   loss {now.train_loss:.3f}   held-out {now.loss:.3f}"
        f"   accuracy {now.accuracy:.3f}{exact}"
    )


# --------------------------------------------------------------------------------------------------
# The program


def draw(outcome: Outcome, path: Path) -> None:
    """Plot losses with their baselines, and accuracy with chance."""
    task, steps = outcome.task, [m.step for m in outcome.measured]
    canvas = figure.Figure(figsize=(10, 4.5), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.plot(
        range(1, len(outcome.train_losses) + 1), outcome.train_losses, alpha=0.6, lw=1, label="training"
    )
    left.plot(steps, [m.loss for m in outcome.measured], marker="o", ms=4, label="held-out")
    for (name, loss), style in zip(task.losses.items(), ("-", "--", ":"), strict=False):
        left.axhline(loss, color="gray", ls=style, lw=1, label=f"{name}: {loss:.3f}")
    left.set(xlabel="step", ylabel="loss (nats per answer)", title=task.name)
    right.plot(steps, [m.accuracy for m in outcome.measured], marker="o", ms=4, label="answers correct")
    if task.source is None:
        right.plot(steps, [m.exact for m in outcome.measured], marker="o", ms=4, label="sequences exact")
    else:
        best = task.source.best_accuracy()
        right.axhline(best, color="gray", ls="-", lw=1, label=f"best possible: {best:.3f}")
    right.axhline(task.chance, color="gray", ls=":", lw=1, label=f"guessing: {task.chance:.3f}")
    right.set(xlabel="step", ylabel="fraction of held-out", title=outcome.label)
    right.set_ylim(-0.03, 1.03)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figures.save(canvas, path)


def record(outcome: Outcome, folder: Path) -> None:
    """Write the measurements as a run directory, with the known losses of the task as baselines."""
    task, output = outcome.task, run_dir.RunDir(folder)
    train = dataclasses.replace(task.train, steps=max(1, len(outcome.train_losses)))
    shapes = {"model": dataclasses.asdict(task.model), "train": dataclasses.asdict(train)}
    output.write_config({"config": f"probe {task.name}", **shapes, run_dir.BASELINES: task.losses})
    held_out = {each.step: each for each in outcome.measured}
    for step, loss in enumerate(outcome.train_losses, start=1):
        output.metrics(step, train_loss=loss)
        if step in held_out:
            output.metrics(step, val_loss=held_out[step].loss, accuracy=held_out[step].accuracy)
    output.log(f"{outcome.label}: {outcome.verdict}")
    output.close()


def main(options: commands.ProbeConfig) -> int:
    """Train on the tasks of `options`. Returns the exit status."""
    with parse.exit_on_error():
        names = probe_tasks.task_names(options.task)
        out = Path(options.out)
        files.create_folder(out)
        if options.mine is not None:
            swap.use(options.mine)
    print(f"pieces    {swap.describe()}")
    if len(names) > 1:
        print(f"tasks     {', '.join(names)}: at most a minute each; for one, name it\nfigures   {out}/")
    passed = 0
    for name in names:
        task = probe_tasks.TASKS[name](options.seed)
        example = probe_tasks.hold_out(task, options.seed)[0].tolist()
        print(f"\n{name}: {task.about}\n{task.show(example)}")
        outcome = learn(task, options.seed, options.steps)
        passed += outcome.passed
        print(f"{outcome.label}: {outcome.verdict}")
        with parse.exit_on_error():
            draw(outcome, out / f"{name}.png")
            print(f"figure    {out / name}.png")
            if options.record:
                record(outcome, folder := run_dir.make_folder(f"probe-{name}"))
                print(f"run       {folder}")
    if len(names) > 1:
        print(f"\n{passed} of {len(names)} tasks passed")
    return 0 if passed == len(names) else 1
