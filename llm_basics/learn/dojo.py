"""A small model that learns with one hidden mistake, and what can be seen of it from outside.

The text comes from a Markov source, of which the lowest possible loss is known. Everything else is as in a
real run: the steps and the optimizer of `update`.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.core import config, model, trainer
from llm_basics.learn import judge, log_checks

PROGRAM = "uv run python -m llm_basics.learn"
SHAPE = config.ModelConfig(vocab_size=16, context_length=32, d_model=32, n_layers=2, n_heads=2)
STEPS = 120
SETTINGS = config.TrainConfig(
    steps=STEPS, batch_size=16, lr=1e-2, warmup_steps=10, grad_accumulation_steps=2, dtype="float32"
)

# steps whose mistakes a whole model can show
STEPS_SHOWN = (
    "linear softmax cross_entropy swiglu rms_norm rope attention multi_head block transformer adamw clipping "
    "schedule train_step"
).split()
N_OPTIONS = 5


@dataclass(frozen=True)
class Evidence:
    """What a training run shows from outside."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, float]
    """The norm of the last gradient of each parameter; NaN where there is none."""
    sees_the_future: bool
    """Whether a later token changes an earlier prediction."""
    sees_the_past: bool
    lrs: list[float]

    def summary(self) -> tuple[object, ...]:
        """Rounded, to tell whether two runs look alike."""
        rounded = tuple(round(loss, 2) for loss in self.losses[::10])
        norms = tuple(round(norm, 1) for norm in self.grad_norms[::10])
        unlearned = tuple(name for name, norm in self.gradients.items() if not norm > 0)
        return rounded, norms, unlearned, self.sees_the_future, self.sees_the_past, tuple(self.lrs[::10])


@functools.cache
def source() -> tuple[np.ndarray, float]:
    """A text of a Markov source of order 1 with 16 states, and its entropy rate in nats."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(SHAPE.vocab_size, 0.4), size=SHAPE.vocab_size)
    # the stationary distribution is what many transitions lead to
    stationary = np.linalg.matrix_power(transition, 1000)[0]
    logarithms = np.log(transition, where=transition > 0, out=np.zeros_like(transition))
    rate = -(stationary[:, None] * transition * logarithms).sum()
    text = [0]
    cumulative = transition.cumsum(1)
    for draw in rng.random(60_000):
        text.append(min(int(np.searchsorted(cumulative[text[-1]], draw)), SHAPE.vocab_size - 1))
    return np.array(text), float(rate)


def practice() -> Evidence:
    """Train with the pieces that are in place."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text, _ = source()
    rng = np.random.default_rng(1)
    lm = model.TransformerLM(SHAPE)
    optimizer = trainer.make_optimizer(lm, SETTINGS)
    losses, norms, lrs = [], [], []
    for step in range(1, STEPS + 1):
        batches = [_batch(text, rng) for _ in range(SETTINGS.grad_accumulation_steps)]
        result = trainer.train_step(lm, optimizer, batches, step, SETTINGS)
        losses.append(float(result.train_loss))
        norms.append(float(result.grad_norm))
        lrs.append(result.lr)
    gradients = {
        name: float(p.grad.norm()) if p.grad is not None else float("nan")
        for name, p in lm.named_parameters()
    }
    future, past = _looks(lm)
    return Evidence(losses, norms, gradients, future, past, lrs)


def _batch(text: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    starts = rng.integers(0, len(text) - SHAPE.context_length - 1, size=SETTINGS.batch_size)
    windows = torch.from_numpy(np.stack([text[s : s + SHAPE.context_length + 1] for s in starts]))
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def _looks(lm: torch.nn.Module) -> tuple[bool, bool]:
    """Whether the prediction at position 8 changes with the token at 12, and with that at 4."""
    lm.eval()
    tokens = torch.arange(16)[None] % SHAPE.vocab_size
    usual = lm(tokens)
    if usual.shape[1] != tokens.shape[1]:
        return False, True
    changes = []
    for place in (12, 4):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 5) % SHAPE.vocab_size
        changes.append(not torch.allclose(lm(other)[0, 8], usual[0, 8], atol=1e-6))
    return changes[0], changes[1]


@functools.cache
def healthy() -> Evidence:
    """The run of the reference."""
    with swap.reference_only():
        return practice()


# --------------------------------------------------------------------------------------------------


def enter(seed: int, answer: int | None) -> int:
    """Show what a hidden mistake does, or judge an answer. The exit status is 0 unless it was wrong."""
    hidden, evidence = _hide(seed)
    rng = random.Random(seed)
    others = [m for m in _candidates() if m.name != hidden.name]
    options = [hidden, *rng.sample(others, N_OPTIONS - 1)]
    rng.shuffle(options)
    if answer is not None:
        if not 1 <= answer <= len(options):
            raise ValueError(f"--answer must be from 1 to {len(options)}, got {answer}")
        is_right = options[answer - 1] is hidden
        print(
            f"{'right' if is_right else 'no'}: it was {hidden.name.upper()} in {hidden.piece}. {hidden.says}"
        )
        return 0 if is_right else 1
    print("\n".join(describe(evidence)))
    print("\nWhich mistake is it?")
    for number, option in enumerate(options, start=1):
        print(f"  {number}  {option.piece.split('.')[1]}: {option.name}")
    print(f"your answer: {PROGRAM} dojo --seed {seed} --answer NUMBER")
    return 0


def _candidates() -> list[Any]:
    return [m for name in STEPS_SHOWN for m in judge.load(name).mistakes if m.same_as is None]


@functools.cache
def _hide(seed: int) -> tuple[Any, Evidence]:
    """A mistake with which the model runs, and looks otherwise than without; and what is seen of it."""
    candidates = _candidates()
    random.Random(seed).shuffle(candidates)
    for mistake in candidates:
        try:
            with swap.reference_only(), swap.replaced({mistake.piece: mistake.wrong}):
                evidence = practice()
        except Exception:
            continue  # one that ends in an error needs no detective
        if evidence.summary() != healthy().summary():
            return mistake, evidence
    raise AssertionError("no mistake of the catalogue shows")


def describe(evidence: Evidence) -> Iterator[str]:
    """What is seen, beside what a healthy run shows."""
    usual, rate = healthy(), source()[1]
    yield f"A model of {SHAPE.n_layers} blocks learns a Markov source. Something in it is wrong."
    yield f"lowest possible loss {rate:.3f}, guessing evenly {np.log(SHAPE.vocab_size):.3f} nats\n"
    yield f"{'step':>6} {'loss':>8} {'healthy':>8} {'grad norm':>10} {'healthy':>8} {'lr':>8}"
    for step in (1, 2, 5, 10, 20, 40, 80, STEPS):
        i = step - 1
        yield (
            f"{step:>6} {evidence.losses[i]:>8.3f} {usual.losses[i]:>8.3f} {evidence.grad_norms[i]:>10.3g} "
            f"{usual.grad_norms[i]:>8.3g} {evidence.lrs[i]:>8.2g}"
        )
    unlearned = [name for name, norm in evidence.gradients.items() if not norm > 0]
    yield f"\nparameters whose gradient is missing or zero: {', '.join(unlearned) or 'none'}"
    yield f"a later token changes an earlier prediction: {'yes' if evidence.sees_the_future else 'no'}"
    yield f"an earlier token changes a later prediction: {'yes' if evidence.sees_the_past else 'no'}"
    metrics = [
        {"step": i + 1, "train_loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(evidence.losses, evidence.grad_norms, strict=True))
    ]
    for seen, _ in log_checks.findings(metrics, SHAPE.vocab_size, rate):
        yield f"the log says: {seen}"
