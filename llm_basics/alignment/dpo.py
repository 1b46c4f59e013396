"""Direct preference optimization: learn from pairs of responses, one preferred, without a reward model.

The reward of a response is its log-probability ratio between policy and reference; the loss is the logistic
loss of the difference of the two rewards (DPO, arXiv 2305.18290). Initially policy and reference are equal,
and the loss is log 2.

    >>> start = torch.tensor([-5.0])
    >>> dpo_loss(start, start, start, start, beta=0.1)
    tensor([0.6931])
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.alignment import packing, response_log_probs


def negative_log_sigmoid(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`-log sigmoid(x) = log(1 + exp(-x))`, exact for any size of x.

    >>> negative_log_sigmoid(torch.tensor([-1000.0])), negative_log_sigmoid(torch.tensor([0.0]))
    (tensor([1000.]), tensor([0.6931]))
    """
    # without a clamp or an absolute value, whose gradients at x = 0, where training starts, are not -1/2
    return torch.logaddexp(-x, torch.zeros_like(x))


def dpo_loss(
    policy_chosen: Float[Tensor, "..."],
    policy_rejected: Float[Tensor, "..."],
    ref_chosen: Float[Tensor, "..."],
    ref_rejected: Float[Tensor, "..."],
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    """The loss of each pair, from the log-probabilities of whole responses.

    With the margin `h = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)`:
    `sigmoid`: `-log sigmoid(beta h)`, or with label smoothing e, for pairs that are wrong with probability
    e, `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`; `ipo`: `(h - 1 / (2 beta))^2`, which has its
    minimum at a finite margin, unlike sigmoid (arXiv 2310.12036).

    >>> two, one = torch.tensor([-2.0]), torch.tensor([-1.0])
    >>> dpo_loss(one, two, two, two, beta=0.5), dpo_loss(one, two, two, two, beta=0.5, loss_type="ipo")
    (tensor([0.4741]), tensor([0.]))
    """
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    if loss_type != "sigmoid":
        raise ValueError(f"loss_type must be 'sigmoid' or 'ipo', got {loss_type!r}")
    right, wrong = negative_log_sigmoid(beta * margin), negative_log_sigmoid(-beta * margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def sequence_log_probs(model: Any, tokens: dict[str, Tensor]) -> Float[Tensor, " batch"]:
    """`log p(response | prompt)` of each sequence: the sum over the tokens of its response.

    >>> tokens = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[1, 2]])}
    >>> tokens["response_mask"] = torch.tensor([[False, True]])
    >>> sequence_log_probs(lambda ids: torch.zeros(*ids.shape, 4), tokens)
    tensor([-1.3863])
    """
    scored = response_log_probs.get_response_log_probs(model, tokens["input_ids"], tokens["labels"])
    return response_log_probs.masked_normalize(scored["log_probs"], tokens["response_mask"], dim=1)


def compute_per_instance_dpo_loss(
    lm: Any,
    lm_ref: Any,
    tokenizer: Any,
    beta: float,
    prompt: str,
    response_chosen: str,
    response_rejected: str,
) -> Float[Tensor, ""]:
    """The DPO loss of two responses to a prompt, formatted as an instruction, each with the end token.

    The reference is evaluated without a gradient; it may be on another device.
    """
    responses = [response + packing.end_token(tokenizer) for response in (response_chosen, response_rejected)]
    instructions = [packing.format_instruction(prompt)] * 2
    tokens = response_log_probs.tokenize_prompt_and_output(instructions, responses, tokenizer)
    device, ref_device = (next(model.parameters()).device for model in (lm, lm_ref))
    policy = sequence_log_probs(lm, {name: tensor.to(device) for name, tensor in tokens.items()})
    with torch.no_grad():
        reference = sequence_log_probs(
            lm_ref, {name: tensor.to(ref_device) for name, tensor in tokens.items()}
        )
    reference = reference.to(device)
    return dpo_loss(policy[0], policy[1], reference[0], reference[1], beta)
