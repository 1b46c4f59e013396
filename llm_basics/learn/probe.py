"""Can this stack of pieces learn? Small tasks with known answers, each in well under a minute.

uv run python -m llm_basics.probe                               all tasks, with the reference's pieces
uv run python -m llm_basics.probe reverse --mine mine.py        one task, with yours
"""

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
from llm_basics.cli import commands, parse
from llm_basics.core import dataloader, trainer
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.learn import probe_tasks
from llm_basics.runs import run_dir

# how many measurements on the way, and of how many held-out sequences; the last is of all
MEASUREMENTS, LOOK_AT = 10, 100

# how far above the entropy rate a loss may stay, in nats
CLOSE = 0.03

# equal scores may be rounded to another answer, but in so few sequences that more is a leak
LEAK = 0.1


def collate(
    task: probe_tasks.Task, sequences: Int[np.ndarray, "n length"]
) -> tuple[Int[Tensor, "n seq"], Int[Tensor, "n seq"]]:
    """Inputs, and as targets the next tokens where they are answers."""
    tokens = torch.from_numpy(sequences).long()
    is_answer = torch.zeros(tokens.shape[-1], dtype=torch.bool)
    is_answer[list(task.answers)] = True
    return tokens[:, :-1], tokens.masked_fill(~is_answer, dataloader.IGNORE_INDEX)[:, 1:]


# --------------------------------------------------------------------------------------------------
# What was learned?


@dataclass(frozen=True)
class Measurement:
    """How good a model is on held-out sequences after a step."""

    step: int
    train_loss: float
    """Of the batch of that step."""
    loss: float
    """On the held-out sequences, in nats per answer."""
    accuracy: float
    """The share of right answers."""
    exact: float = math.nan
    """The share of sequences whose answers are all right, given one by one without seeing what follows."""
    leak: float = 0.0
    """How many more, as a share, are right up to their last answer if the answers stand there to be seen."""
    noise: float = 0.0
    """How far a loss may be off by chance."""


@torch.no_grad()
def answer(
    model: nn.Module, sequences: Int[Tensor, "n length"], places: tuple[int, ...]
) -> Int[Tensor, "n length"]:
    """The sequences with the model's likeliest tokens at `places`, each from what is before it alone."""
    tokens = sequences.clone()
    for place in places:
        tokens[:, place] = model(tokens[:, :place])[:, -1].argmax(-1)
    return tokens


@torch.no_grad()
def measure(
    model: nn.Module,
    task: probe_tasks.Task,
    held_out: Int[np.ndarray, "n length"],
    step: int = 0,
    train_loss: float = math.nan,
) -> Measurement:
    """How good `model` is on `held_out`."""
    was_training = model.training
    model.eval()
    inputs, targets = collate(task, held_out)
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets).item()
    places = list(task.answers)
    wanted = torch.from_numpy(held_out).long()[:, places]
    told = logits.argmax(-1)[:, [place - 1 for place in places]] == wanted
    if task.source is not None:
        # four standard errors; tokens of one sequence depend on each other, sequences do not
        surprisals = task.source.surprisal(held_out).mean(axis=1)
        noise = 4 * float(surprisals.std()) / math.sqrt(len(surprisals))
        measured = Measurement(step, train_loss, loss, told.float().mean().item(), noise=noise)
    else:
        sequences = torch.from_numpy(held_out).long()
        right = answer(model, sequences, task.answers)[:, places] == wanted
        accuracy, exact = right.float().mean().item(), right.all(-1).float().mean().item()
        # the last answer is not among the inputs
        at_once, one_by_one = (share[:, :-1].all(-1).float().mean().item() for share in (told, right))
        measured = Measurement(step, train_loss, loss, accuracy, exact, at_once - one_by_one)
    model.train(was_training)
    return measured


# --------------------------------------------------------------------------------------------------
# Verdicts


def judge(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Whether a task was learned; and if not, what that means and where to look."""
    passed, why = (judge_answers if task.source is None else judge_loss)(task, last)
    if not passed and last.step < task.train.steps:
        why += f" (only {last.step} of {task.train.steps} steps were made)"
    return passed, why


def judge_answers(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Passed where every held-out sequence is exact, or as many as the task needs.

    To a model that sees nothing of what follows it is the same whether the answers stand there: the sequences
    that are right when it answers one by one are those that are right when the whole goes in.
    """
    n_exact = round(last.exact * task.n_held_out)
    counted = f"{n_exact} of {task.n_held_out} held-out sequences exact"
    if n_exact >= task.needed * task.n_held_out:
        return True, counted
    score = f"{counted}, {last.accuracy:.1%} of answers right"
    if last.leak > LEAK:
        return False, (
            f"{score}; {last.leak:.1%} of sequences more are right if what follows is there to be read. This "
            "is a leak, the model sees its answers: is the causal mask there?"
        )
    guessing = list(task.losses.values())[-1]
    if last.train_loss < guessing / 10 and last.loss > guessing / 2:
        return False, (
            f"{score}; the loss is {last.train_loss:.3f} in training and {last.loss:.3f} on held-out "
            "sequences: learned by heart, without the rule; more steps may find it, more weight decay too"
        )
    if last.accuracy < 2 * task.chance:
        return False, (
            f"{score}, where chance gets {task.chance:.1%}: as good as guessing. Attention does not reach "
            "the other position (is the mask or softmax right?), or no gradient reaches the weights"
        )
    return False, (
        f"{score}, where chance gets {task.chance:.1%}: something is learned, but not all. If the loss still "
        "falls, more steps help; if it is flat, look at the positions (RoPE), then at the optimizer"
    )


def judge_loss(task: probe_tasks.Task, last: Measurement) -> tuple[bool, str]:
    """Passed where the loss is as low as the entropy rate, and not lower."""
    lowest, unigram, guessing = task.losses.values()
    score = f"held-out loss {last.loss:.3f}, entropy rate {lowest:.3f}"
    if last.loss < lowest - last.noise:
        return False, (
            f"{score}, which no model can go below (noise: {last.noise:.3f}). This is a leak, the model sees "
            "its answers: is the causal mask there, are targets the next tokens?"
        )
    if last.loss < lowest + last.noise + CLOSE:
        return True, score
    if last.loss > guessing - CLOSE:
        return False, (
            f"{score}; to guess gets {guessing:.3f}, so nothing was learned: does a gradient reach the "
            "weights, does the optimizer change them, do targets belong to their inputs?"
        )
    if last.loss > unigram - CLOSE:
        return False, (
            f"{score}; to know how often each token comes gets {unigram:.3f}, so the token before is not "
            "made use of: do embeddings reach the output, through the residual stream?"
        )
    return False, (
        f"{score}: something is learned, but not all. If the loss still falls, more steps help; if it is "
        "flat, look at the learning rate and the optimizer"
    )


# --------------------------------------------------------------------------------------------------
# Training


@dataclass
class Outcome:
    """What became of a task."""

    task: probe_tasks.Task
    train_losses: list[float] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    passed: bool = False
    verdict: str = ""


def learn(
    task: probe_tasks.Task, seed: int, steps: int | None = None, log: Callable[[str], None] = print
) -> Outcome:
    """Train a new model on a task, by `steps` instead of its own number if given, and judge it."""
    n_steps = steps or task.train.steps
    options = dataclasses.replace(
        task.train, steps=n_steps, warmup_steps=min(task.train.warmup_steps, n_steps // 10)
    )
    outcome, clock = Outcome(task), run_dir.Stopwatch()
    held_out = probe_tasks.hold_out(task, seed)
    sequences = probe_tasks.fresh(task, held_out, seed)
    torch.manual_seed(seed)
    try:
        model = models.TransformerLM(task.model)
        optimizer = trainer.make_optimizer(model, options)
        for step in range(1, n_steps + 1):
            # one batch a step: its loss is the mean over its answers alone, whatever their number
            batch = collate(task, next(sequences))
            result = trainer.train_step(model, optimizer, [batch], step, options)
            trainer.check_finite(step, result.lr, result.train_loss, result.grad_norm)
            outcome.train_losses.append(result.train_loss.item())
            if step % max(1, n_steps // MEASUREMENTS) == 0 or step == n_steps:
                looked_at = held_out if step == n_steps else held_out[:LOOK_AT]
                outcome.measured.append(measure(model, task, looked_at, step, outcome.train_losses[-1]))
                log(f"{_progress(outcome.measured[-1], n_steps)}   {clock.total():.0f} s")
    except FloatingPointError as error:
        outcome.verdict = str(error)
        return outcome
    except Exception as error:
        # of the reference it would be a bug
        if not swap.user_pieces():
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.verdict = (
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}); targets of "
            f"{dataloader.IGNORE_INDEX}, cross_entropy's ignore_index, are no answers and must not count"
        )
        return outcome
    outcome.passed, outcome.verdict = judge(task, outcome.measured[-1])
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
    """Draw the losses beside those to compare with, and the accuracy beside chance."""
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
    right.plot(steps, [m.accuracy for m in outcome.measured], marker="o", ms=4, label="answers right")
    if task.source is None:
        right.plot(steps, [m.exact for m in outcome.measured], marker="o", ms=4, label="sequences exact")
    else:
        best = task.source.best_accuracy()
        right.axhline(best, color="gray", ls="-", lw=1, label=f"best possible: {best:.3f}")
    right.axhline(task.chance, color="gray", ls=":", lw=1, label=f"guessing: {task.chance:.3f}")
    right.set(xlabel="step", ylabel="share of held-out", title="passed" if outcome.passed else "failed")
    right.set_ylim(-0.03, 1.03)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    canvas.savefig(path, dpi=120)


def main(options: commands.ProbeConfig) -> int:
    """Learn the tasks that `options` name. Returns the exit status."""
    with parse.exit_on_error():
        names = probe_tasks.named(options.task)
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        if options.mine is not None:
            swap.use(options.mine)
    print(f"pieces    {swap.describe()}")
    passed = 0
    try:
        for name in names:
            task = probe_tasks.TASKS[name](options.seed)
            example = probe_tasks.hold_out(task, options.seed)[0].tolist()
            print(f"\n{name}: {task.about}\n{task.show(example)}")
            outcome = learn(task, options.seed, options.steps)
            passed += outcome.passed
            print(f"{'passed' if outcome.passed else 'failed'}: {outcome.verdict}")
            draw(outcome, out / f"{name}.png")
            print(f"drawn     {out / name}.png")
    except KeyboardInterrupt:
        print()
        return 130
    if len(names) > 1:
        print(f"\n{passed} of {len(names)} tasks passed")
    return 0 if passed == len(names) else 1
