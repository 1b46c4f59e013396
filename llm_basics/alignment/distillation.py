"""Knowledge distillation: a small model learns the next-token probabilities of a large one.

A text has one next token; the teacher's probabilities also contain those of all others. A temperature makes
them softer (arXiv 1503.02531). The forward divergence is mode-covering: the student assigns probability to
all texts of the teacher; the reverse one is mode-seeking: it may ignore texts that it cannot model (MiniLLM,
arXiv 2306.08543). But: both models must have the same tokens.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.9, 0.1]]))
    >>> kl_divergence(student, teacher), kl_divergence(student, teacher, "reverse")
    (tensor([0.3681]), tensor([0.5108]))
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.alignment import response_log_probs
from llm_basics.core import functional as F


def kl_divergence(
    student_logits: Float[Tensor, "... vocab"],
    teacher_logits: Float[Tensor, "... teacher_vocab"],
    direction: str = "forward",
    temperature: float = 1.0,
) -> Float[Tensor, "..."]:
    """The divergence of the next-token probabilities p of the teacher and q of the student, at temperature T.

    `forward`: `T^2 sum_v p_v (log p_v - log q_v)`; `reverse`: `T^2 sum_v q_v (log q_v - log p_v)`, where p
    and q are the softmax of logits / T. The factor compensates for gradients that scale with 1 / T^2. The
    teacher has no gradient. Half precision is computed in float32.

    >>> kl_divergence(torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0]), temperature=2.0)
    tensor(1.8485)
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            "student and teacher must have one vocabulary, got logits of "
            f"{student_logits.shape[-1]} and {teacher_logits.shape[-1]} tokens; use one tokenizer for both"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; 1 to 4 are usual")
    log_q = F.log_softmax(F.to_float32(student_logits) / temperature)
    log_p = F.log_softmax(F.to_float32(teacher_logits.detach()) / temperature)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    # a token of probability 0 adds 0, the limit of p log p, instead of 0 times infinity
    is_impossible = first == -torch.inf
    difference = first.masked_fill(is_impossible, 0.0) - second.masked_fill(is_impossible, 0.0)
    return temperature**2 * (first.exp() * difference).sum(-1)


def distillation_loss(
    student_logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "batch seq teacher_vocab"],
    labels: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | Float[Tensor, "batch seq"] | Int[Tensor, "batch seq"],
    direction: str = "forward",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean over the tokens where `mask` is 1 of `(1 - w) KL + w (-log q(label))`, with w = `hard_weight`.

    The divergence is that of `kl_divergence`; the label's log-probability is at a temperature of 1.

    >>> student, teacher = torch.zeros(1, 2, 2), torch.log(torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]))
    >>> labels = torch.tensor([[0, 1]])
    >>> distillation_loss(student, teacher, labels, torch.tensor([[1, 0]]))
    tensor(0.3681)
    >>> distillation_loss(student, teacher, labels, torch.tensor([[1, 0]]), hard_weight=0.5)
    tensor(0.5306)
    """
    soft = kl_divergence(student_logits, teacher_logits, direction, temperature)
    # a masked label may be -100, which is not a token
    tokens = labels.masked_fill(mask == 0, 0)
    log_probs = F.log_softmax(F.to_float32(student_logits)).gather(-1, tokens[..., None]).squeeze(-1)
    each = soft if hard_weight == 0 else (1 - hard_weight) * soft - hard_weight * log_probs
    return response_log_probs.masked_mean(each, mask)
