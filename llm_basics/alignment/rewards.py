"""Rewards that a program can compute: an exact answer, a format, a number, a letter.

A reward function maps a response and the correct answer to `reward`, which training maximizes, and its parts
`format_reward` and `answer_reward`. A truncated response has no answer: rewarding it would teach the model
not to end.

    >>> number_reward("6 boxes of 3 are 18.0", "18")["reward"], number_reward("about 6 boxes", "18")["reward"]
    (1.0, 0.0)
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# 1,234.5 and -3 and .5, but not the hyphen of 3-4, nor the full stop after a number
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+|\d+(?:\.\d+)?")

OPEN, CLOSE = "<answer>", "</answer>"


def parse_gsm8k_response(model_output: str) -> str | None:
    """The last number of a text, without the commas of thousands, or None.

    >>> parse_gsm8k_response("5 * 3 = 15. She pays $1,250.50."), parse_gsm8k_response("no idea")
    ('1250.50', None)
    """
    found = NUMBER.findall(model_output)
    return found[-1].replace(",", "") if found else None


def parse_mmlu_response(mmlu_example: dict[str, Any], model_output: str) -> str | None:
    """The letter of a multiple-choice answer, or None.

    It follows "answer is", if that occurs; else it is the only isolated letter. "A" as a word of the text is
    not an answer.

    >>> options = {"options": ["1", "2", "3", "4"]}
    >>> [parse_mmlu_response(options, text) for text in ("The correct answer is (B).", "C. 3", "A guess?")]
    ['B', 'C', None]
    """
    letters = "ABCDEFGHIJ"[: len(mmlu_example["options"])]
    stated = re.findall(rf"(?i:answer\s*(?:is|:))\s*\(?\**([{letters}])\b", model_output)
    if stated:
        return stated[-1]
    alone = re.findall(rf"(?<![\w'])([{letters}])(?=[).:,]|\s*$)", model_output)
    return alone[0] if len(set(alone)) == 1 else None


def same_answer(answer: str | None, ground_truth: str) -> bool:
    """Whether two answers are equal: as numbers if both are numbers, else as text without outer spaces.

    >>> same_answer("18.0", "18"), same_answer("1,000", "1000"), same_answer("Paris ", "paris")
    (True, True, False)
    """
    if answer is None:
        return False
    texts = [text.strip().removeprefix("$").replace(",", "") for text in (answer, ground_truth)]
    if all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) for text in texts):
        return float(texts[0]) == float(texts[1])
    return answer.strip() == ground_truth.strip()


def exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    """1 if the whole response is the answer. The format is always valid.

    >>> exact_match_reward(" red\\n", "red")
    {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    answer = float(same_answer(response, ground_truth))
    return {"reward": answer, "format_reward": 1.0, "answer_reward": answer}


def number_reward(response: str, ground_truth: str) -> dict[str, float]:
    """1 if the last number of the response equals the answer. The format is valid if there is a number.

    >>> number_reward("She has 3 + 4 = 7 apples.", "7.0")
    {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    number = parse_gsm8k_response(response)
    answer = float(same_answer(number, ground_truth))
    return {"reward": answer, "format_reward": float(number is not None), "answer_reward": answer}


def tagged_answer_reward(response: str, ground_truth: str) -> dict[str, float]:
    """1 if the response ends with a single `<answer>...</answer>` with the correct answer.

    The reward of the format alone is 0: otherwise a model learns to write tags around any text.

    >>> tagged_answer_reward("3 + 4 <answer>7</answer>", "7")["reward"]
    1.0
    >>> tagged_answer_reward("3 + 4 <answer>7", "7")  # cut off
    {'reward': 0.0, 'format_reward': 0.0, 'answer_reward': 0.0}
    """
    before, opened, rest = response.partition(OPEN)
    answer, closed, after = rest.partition(CLOSE)
    once = opened and closed and not after.strip() and OPEN not in rest and CLOSE not in before
    right = float(bool(once) and same_answer(answer, ground_truth))
    return {"reward": right, "format_reward": float(bool(once)), "answer_reward": right}


def compute_rollout_rewards(
    reward_fn: Callable[[str, str], dict[str, float]],
    rollout_responses: Sequence[str],
    repeated_ground_truths: Sequence[str],
) -> tuple[Float[Tensor, " rollouts"], dict[str, float]]:
    """The reward of each response, and the means of its parts over the responses.

    >>> compute_rollout_rewards(number_reward, ["7", "six"], ["7", "6"])
    (tensor([1., 0.]), {'reward': 0.5, 'format_reward': 0.5, 'answer_reward': 0.5})
    """
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    found = [reward_fn(response, truth) for response, truth in pairs]
    means = {part: sum(each[part] for each in found) / len(found) for part in found[0]}
    return torch.tensor([each["reward"] for each in found], dtype=torch.float32), means
