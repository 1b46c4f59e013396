"""Options of the post-training programs, in addition to those of every training run."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from llm_basics.core import config, option_types

Size = Annotated[int, option_types.Range(ge=2, most=10**5)]


@dataclass(frozen=True)
class RlOptions(option_types.Options):
    """Options of reinforcement learning from rewards of groups of responses."""

    prefix: ClassVar[str] = "rl."

    reward: str = "exact"
    """Reward of a response: exact (the whole response is the expected one), number (its last number is),
    tagged (the answer in <answer></answer> is), or FILE.py:FUNCTION of (prompt, response, expected)."""
    prompts: str = "auto"
    """Prompts to train on: a file of conversations as --data, or auto: those of --data, and for demo new
    synthetic questions. Held-out prompts of --data are excluded."""
    group_size: Size = 16
    """Number of responses per prompt, which are compared with each other."""
    max_new_tokens: option_types.Count = 24
    """Maximum response length in tokens; truncated responses have the reward 0."""
    temperature: option_types.Positive = 1.0
    """Divides the logits, in sampling and in the loss; above 1 responses of a group differ more."""
    method: Literal["none", "noclip", "grpo", "gspo"] = "grpo"
    """Loss of a token: -A log p (none), or with the importance ratio, of the token (noclip, and clipped
    grpo) or of the response (gspo)."""
    baseline: Literal["mean", "none"] = "mean"
    """Baseline subtracted from the rewards of a group: their mean, or none."""
    normalizer: Literal["std", "mean", "none"] = "std"
    """Advantages of a group are divided by its standard deviation (GRPO), its mean (MaxRL), or nothing."""
    normalization: Literal["sequence", "constant"] = "sequence"
    """Mean of the loss over each response (GRPO), or its sum over max_new_tokens (constant, Dr. GRPO)."""
    updates: option_types.Count = 1
    """Optimizer updates on the responses of a step."""
    cliprange: option_types.Positive = 0.2
    """Ratios are clipped to 1 - cliprange and 1 + cliprange; without effect on the first update."""
    kl: option_types.NonNegative = 0.0
    """Weight of the KL divergence from the initial model in the loss (estimator k3)."""
    record_every: int = 10
    """Number of steps between records of all responses in rollouts.jsonl. 0: none."""


@dataclass(frozen=True)
class DpoOptions(option_types.Options):
    """Options of direct preference optimization."""

    prefix: ClassVar[str] = "dpo."

    pairs: str | None = None
    """JSONL file of prompt, chosen, rejected. None: --data if it has them, else pairs made of the model's own
    responses to the prompts of --data, by comparing with the expected ones."""
    samples: Size = 8
    """Number of responses per prompt from which pairs are made."""
    prompts: option_types.Count = 1000
    """Number of prompts to which responses are sampled."""
    max_new_tokens: option_types.Count = 24
    """Maximum length of these responses in tokens."""
    beta: option_types.Positive = 0.1
    """Weight of the KL divergence from the initial model: larger values keep the model closer to it."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of a pair: DPO (sigmoid), or IPO, which has its minimum at a finite margin."""
    sft_weight: option_types.NonNegative = 1.0
    """Weight of the cross-entropy of the chosen responses in the loss, in nats per token: without it their
    probability may fall, as long as that of the rejected ones falls faster (arXiv 2404.19733)."""
    label_smoothing: Annotated[float, option_types.Range(ge=0, lt=0.5)] = 0.0
    """Label smoothing: probability that a preference label is wrong (sigmoid only)."""


@dataclass(frozen=True)
class DistillOptions(option_types.Options):
    """Options of knowledge distillation."""

    prefix: ClassVar[str] = "distill."

    teacher: str = ""
    """Run directory of the teacher; the student uses its tokenizer."""
    direction: Literal["forward", "reverse"] = "forward"
    """KL divergence of teacher and student: forward is mode-covering, reverse is mode-seeking and may ignore
    texts that the student cannot model."""
    temperature: option_types.Positive = 1.0
    """Divides the logits of both; above 1 the probabilities are softer."""
    hard_weight: option_types.Fraction = 0.5
    """Weight of the cross-entropy of the text; that of the divergence is the rest."""


@dataclass(frozen=True)
class RlConfig(config.Config):
    """Train a fine-tuned model on rewards of its own responses (GRPO and relatives)."""

    rl: RlOptions = field(default_factory=RlOptions)


@dataclass(frozen=True)
class DpoConfig(config.Config):
    """Train a fine-tuned model on pairs of responses, of which one is preferred (DPO)."""

    dpo: DpoOptions = field(default_factory=DpoOptions)


@dataclass(frozen=True)
class DistillConfig(config.Config):
    """Train a small model on the probabilities of a trained one (knowledge distillation)."""

    distill: DistillOptions = field(default_factory=DistillOptions)
