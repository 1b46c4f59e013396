"""Debugging practice: a small model trains with one hidden mistake, to be found from metrics and probes.

The text comes from a Markov source with a known entropy rate. The optimizer and the training step are those
of a real run.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_basics import swap
from llm_basics.core import config, dataloader, model, trainer
from llm_basics.learn import judge, log_checks, probe_tasks

PROGRAM = "uv run python -m llm_basics.learn"
MODEL_CONFIG = config.ModelConfig(vocab_size=16, context_length=32, d_model=32, n_layers=2, n_heads=2)
STEPS = 120
# steps within which a hidden mistake must have an effect; many edge cases have none in this run
FIRST_STEPS = 20
TRAIN_CONFIG = config.TrainConfig(
    steps=STEPS, batch_size=16, lr=1e-2, warmup_steps=10, grad_accumulation_steps=2, dtype="float32"
)

# lessons whose mistakes can affect the training of a model
LESSON_STEPS = (
    "linear softmax cross_entropy swiglu rms_norm rope attention multi_head block transformer adamw clipping "
    "schedule train_step"
).split()
N_OPTIONS = 5


@dataclass(frozen=True)
class Evidence:
    """Metrics of a training run, and tests of the trained model."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, float]
    """Norm of the last gradient of each parameter; NaN if it has none."""
    sees_the_future: bool
    """Whether a later token changes an earlier prediction."""
    sees_the_past: bool
    lrs: list[float]

    def summary(self) -> tuple[object, ...]:
        """Rounded values, equal for indistinguishable runs."""
        rounded = tuple(round(loss, 2) for loss in self.losses[::10])
        norms = tuple(round(norm, 1) for norm in self.grad_norms[::10])
        without_gradient = tuple(name for name, norm in self.gradients.items() if not norm > 0)
        return rounded, norms, without_gradient, self.sees_the_future, self.sees_the_past, self.lrs[::10]


@functools.cache
def source() -> tuple[np.ndarray, float]:
    """A text of a Markov source of order 1 with 16 states, and its entropy rate in nats."""
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(MODEL_CONFIG.vocab_size, 0.4), size=MODEL_CONFIG.vocab_size)
    markov = probe_tasks.Source(transitions)
    return markov.draw(1, 60_000, rng)[0], markov.entropy_rate()


def train(n_steps: int = STEPS) -> Evidence:
    """Train with the pieces in use up to step `n_steps` of the whole run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text, _ = source()
    rng = np.random.default_rng(1)
    lm = model.TransformerLM(MODEL_CONFIG)
    optimizer = trainer.make_optimizer(lm, TRAIN_CONFIG)
    losses, norms, lrs = [], [], []
    sizes = TRAIN_CONFIG.batch_size, MODEL_CONFIG.context_length
    for step in range(1, n_steps + 1):
        n_batches = range(TRAIN_CONFIG.grad_accumulation_steps)
        batches = [dataloader.get_batch(text, *sizes, rng=rng) for _ in n_batches]
        result = trainer.train_step(lm, optimizer, batches, step, TRAIN_CONFIG)
        losses.append(float(result.train_loss))
        norms.append(float(result.grad_norm))
        lrs.append(result.lr)
    gradients = {
        name: float(p.grad.norm()) if p.grad is not None else float("nan")
        for name, p in lm.named_parameters()
    }
    future, past = _visible_context(lm)
    return Evidence(losses, norms, gradients, future, past, lrs)


@torch.no_grad()
def _visible_context(lm: torch.nn.Module) -> tuple[bool, bool]:
    """Whether the prediction at position 8 depends on the token at 12, and on the one at 4."""
    lm.eval()
    tokens = torch.arange(16)[None] % MODEL_CONFIG.vocab_size
    usual = lm(tokens)
    if usual.shape[1] != tokens.shape[1]:
        return False, True
    changes = []
    for position in (12, 4):
        other = tokens.clone()
        other[0, position] = (other[0, position] + 5) % MODEL_CONFIG.vocab_size
        changes.append(not torch.allclose(lm(other)[0, 8], usual[0, 8], atol=1e-6))
    return changes[0], changes[1]


@functools.cache
def healthy(n_steps: int = STEPS) -> Evidence:
    """The run with the reference."""
    with swap.reference_only():
        return train(n_steps)


# --------------------------------------------------------------------------------------------------


def enter(seed: int, answer: int | None) -> int:
    """Print a run with a hidden mistake, or grade an answer. Exit status 1 for a wrong answer."""
    if answer is not None and not 1 <= answer <= N_OPTIONS:
        raise ValueError(f"--answer must be from 1 to {N_OPTIONS}, got {answer}")
    hidden, evidence = _hide(seed)
    rng = random.Random(seed)
    others = [m for m in _candidates() if m.name != hidden.name]
    options = [hidden, *rng.sample(others, N_OPTIONS - 1)]
    rng.shuffle(options)
    if answer is not None:
        is_right = options[answer - 1] is hidden
        grade = "correct" if is_right else "wrong"
        print(f"{grade}: it was {hidden.name.upper()} in {hidden.piece}. {hidden.explanation}")
        return 0 if is_right else 1
    print("\n".join(describe(evidence)))
    print("\nWhich mistake is it?")
    for number, option in enumerate(options, start=1):
        print(f"  {number}  {option.piece.split('.')[1]}: {option.name}")
    print(f"your answer: {PROGRAM} dojo --seed {seed} --answer NUMBER")
    return 0


def _candidates() -> list[Any]:
    return [m for name in LESSON_STEPS for m in judge.load(name).mistakes if m.same_as is None]


@functools.cache
def _hide(seed: int) -> tuple[Any, Evidence]:
    """A mistake that raises no error and changes the run, and the evidence of it."""
    candidates = _candidates()
    random.Random(seed).shuffle(candidates)
    for mistake in candidates:
        try:
            with swap.reference_only(), swap.replaced({mistake.piece: mistake.wrong}):
                if train(FIRST_STEPS).summary() == healthy(FIRST_STEPS).summary():
                    continue
                return mistake, train()
        except Exception:
            continue  # a mistake that raises is trivial to find
    raise AssertionError("no mistake of the catalogue changes the run")


def describe(evidence: Evidence) -> Iterator[str]:
    """The evidence as lines of text, next to that of a healthy run."""
    usual, rate = healthy(), source()[1]
    yield f"A model of {MODEL_CONFIG.n_layers} blocks trains on a Markov source, with one mistake."
    yield f"entropy rate {rate:.3f}, uniform guess {np.log(MODEL_CONFIG.vocab_size):.3f} nats per token\n"
    yield f"{'step':>6} {'loss':>8} {'healthy':>8} {'grad norm':>10} {'healthy':>8} {'lr':>8}"
    for step in (1, 2, 5, 10, 20, 40, 80, STEPS):
        i = step - 1
        yield (
            f"{step:>6} {evidence.losses[i]:>8.3f} {usual.losses[i]:>8.3f} {evidence.grad_norms[i]:>10.3g} "
            f"{usual.grad_norms[i]:>8.3g} {evidence.lrs[i]:>8.2g}"
        )
    without_gradient = [name for name, norm in evidence.gradients.items() if not norm > 0]
    yield f"\nparameters with a missing or zero gradient: {', '.join(without_gradient) or 'none'}"
    yield f"a later token changes an earlier prediction: {'yes' if evidence.sees_the_future else 'no'}"
    yield f"an earlier token changes a later prediction: {'yes' if evidence.sees_the_past else 'no'}"
    metrics = [
        {"step": i + 1, "train_loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(evidence.losses, evidence.grad_norms, strict=True))
    ]
    for seen, _ in log_checks.findings(metrics, MODEL_CONFIG.vocab_size, rate):
        yield f"log check: {seen}"
