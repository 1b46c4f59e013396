"""Rewards by a program: numbers, letters, exact answers, tags, and the rewards of a rollout."""

import re
import types

import torch

from llm_basics.alignment import rewards
from llm_basics.learn import probes

step = probes.Step("rewards")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(rewards))

OPTIONS = {"options": ["100", "1", "10", "unknown"], "question": "How many?", "answer": "A", "subject": "s"}


def numbers(about, cases, **ground):
    step.value(
        about,
        lambda a: [a.run_parse_gsm8k_response(text) for text in cases],
        list(cases.values()),
        axes="text",
        **(ground or {"contract": "parse_gsm8k_response"}),
    )


def letters(about, cases, **ground):
    step.value(
        about,
        lambda a: [a.run_parse_mmlu_response(OPTIONS, text) for text in cases],
        list(cases.values()),
        axes="text",
        **(ground or {"contract": "parse_mmlu_response"}),
    )


def scored(about, name, cases):
    """Reward, format and answer of each pair of response and truth."""

    def observe(a):
        function = {
            "exact": a.run_exact_match_reward,
            "number": a.run_number_reward,
            "tagged": a.run_tagged_answer_reward,
        }[name]
        found = [function(*pair) for pair in cases]
        return [[each["reward"], each["format_reward"], each["answer_reward"]] for each in found]

    step.value(about, observe, list(cases.values()), axes="pair")


numbers("the last number", {"48/2 = 24 in May, so 48 + 24 = 72": "72", "It is 5": "5", "12 apples": "12"})
numbers("no number", {"no idea": None})
FORMS = "the assignment's test has plain integers; prices and negative numbers occur in the answers"
numbers(
    "decimals, and a full stop after the number", {"It costs 2.50": "2.50", "It is 18.": "18"}, beyond=FORMS
)
numbers("commas of thousands", {"She pays $1,250.50": "1250.50", "3,000 km": "3000"}, beyond=FORMS)
numbers("negative numbers", {"The answer is -7": "-7"}, beyond=FORMS)

letters("the answer is B", {"The correct answer is B. There is only one.": "B", "The answer is D.": "D"})
letters("no letter", {"The correct answer is 10000 polyomaviruses.": None})
WORDS = "the assignment's test has one phrase; models write others"
letters("a letter alone", {"C": "C", "B.": "B", "C. 10": "C", "Definitely B": "B"}, beyond=WORDS)
letters(
    "the word A is not an answer", {"A guess? The answer is C": "C", "A good question": None}, beyond=WORDS
)
letters("a letter that is no option", {"The answer is E.": None}, beyond=WORDS)

SAME = [("18.0", "18"), ("1,000", "1000"), (" red ", "red"), ("Red", "red"), ("18", "81"), (None, "1")]
SAME += [("1.50", "1.5"), ("180", "18"), ("red apple", "red"), ("-3", "3")]
step.value(
    "which answers are the same",
    lambda a: [a.run_same_answer(*pair) for pair in SAME],
    [True, True, True, False, False, False, True, False, False, False],
    axes="pair",
)
YES, FORMAT, NO = [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]
scored("an exact answer", "exact", {("red\n", "red"): YES, ("red it is", "red"): FORMAT, ("18.0", "18"): YES})
scored(
    "the last number is right",
    "number",
    {("3 + 4 = 7", "7"): YES, ("7 or 8", "7"): FORMAT, ("seven", "7"): NO},
)
scored(
    "an answer in tags",
    "tagged",
    {
        ("3 + 4 <answer>7</answer>", "7"): YES,
        ("<answer> 7.0 </answer>\n", "7"): YES,
        ("<answer>8</answer>", "7"): FORMAT,
        ("7", "7"): NO,
    },
)
scored(
    "an answer that is cut off",
    "tagged",
    {("3 + 4 <answer>7", "7"): NO, ("<answer>7</ans", "7"): NO, ("7</answer>", "7"): NO},
)
scored(
    "several answers, and text behind the answer",
    "tagged",
    {
        ("<answer>7</answer><answer>8</answer>", "7"): NO,
        ("<answer>6</answer> <answer>7</answer>", "7"): NO,
        ("<answer>7</answer> and more", "7"): NO,
    },
)

RESPONSES, TRUTHS = ["a1", "b2", "c3", "d4", "e5"], ["1", "9", "3", "9", "7"]


def graded(response, truth):
    """Half a point for the format alone."""
    is_right = float(response.endswith(truth))
    return {"reward": 0.5 + 0.5 * is_right, "format_reward": 1.0, "answer_reward": is_right}


step.value(
    "the reward of each response",
    lambda a: a.run_compute_rollout_rewards(graded, list(RESPONSES), list(TRUTHS))[0].float(),
    torch.tensor([1.0, 0.5, 1.0, 0.5, 0.5]),
    axes="rollout",
    contract="rollout_rewards",
)
step.probes.append(
    probes.Probe(
        "more responses than answers",
        lambda a: {
            "result": len(a.run_compute_rollout_rewards(graded, list(RESPONSES), list(TRUTHS)[:4])[0])
        },
        lambda: {"error": "ValueError: 5 responses and 4 answers"},
        0.0,
        0.0,
        beyond="zip without strict drops the rest of a rollout in silence",
    )
)


def mistake(piece, source="written for this catalogue", **more):
    return step.mistake(f"rewards.{piece}", source=source, **more)


@mistake("parse_gsm8k_response")
def first_number(model_output):
    """The first number is taken. A response calculates before it answers: the result is the last number."""
    found = right.NUMBER.findall(model_output)
    return found[0].replace(",", "") if found else None


@mistake("parse_gsm8k_response")
def integers_alone(model_output):
    """Only digits are found, so 2.50 becomes 50 and 1,250 becomes 250. Decimals and the commas of thousands
    belong to the number."""
    found = re.findall(r"-?\d+", model_output)
    return found[-1] if found else None


@mistake("parse_gsm8k_response")
def full_stop_in_the_number(model_output):
    """The full stop at the end of a sentence is taken into the number: "18." is compared with "18". A point
    belongs to a number only if digits follow."""
    found = re.findall(r"-?[\d,]*\d[\d,]*\.?\d*", model_output)
    return found[-1].replace(",", "") if found else None


@mistake("parse_gsm8k_response")
def commas_kept(model_output):
    """The commas of thousands stay in the number, and float cannot read "1,250.50", nor is it equal to
    1250.50. Remove them."""
    found = right.NUMBER.findall(model_output)
    return found[-1] if found else None


@mistake("parse_gsm8k_response")
def minus_lost(model_output):
    """The sign is not part of the number, so -7 is read as 7, and a wrong answer is rewarded. Allow a minus
    before the digits."""
    found = right.parse_gsm8k_response(model_output)
    return found.lstrip("-") if found else None


@mistake("parse_gsm8k_response")
def zero_without_a_number(model_output):
    """A text without a number gives 0. That is a wrong answer, or even the right one, but no answer is
    neither. Return None."""
    return right.parse_gsm8k_response(model_output) or "0"


@mistake("parse_mmlu_response")
def first_capital_letter(mmlu_example, model_output):
    """The first letter from A to D is taken, even within a word. A sentence that begins with "A" or a word
    such as "Correct" is then an answer. The letter must be isolated."""
    found = re.search(r"[A-D]", model_output)
    return found[0] if found else None


@mistake("parse_mmlu_response")
def any_letter_alone(mmlu_example, model_output):
    """Any isolated letter is the answer, also the article A. The text "A good question" contains no answer.
    Search for "answer is" first."""
    found = re.search(r"\b([A-D])\b", model_output)
    return found[1] if found else None


@mistake("parse_mmlu_response")
def only_the_phrase(mmlu_example, model_output):
    """Only "the answer is" is recognized. A model that writes only the letter, as in the instructions, has no
    answer. Accept an isolated letter, too."""
    found = re.search(r"answer is \(?([A-D])\b", model_output)
    return found[1] if found else None


@mistake("parse_mmlu_response")
def letters_beyond_the_options(mmlu_example, model_output):
    """Any letter is accepted, although the question has four options. E is no answer. Derive the letters
    from the number of options."""
    return right.parse_mmlu_response({"options": [""] * 10}, model_output)


@mistake("parse_mmlu_response")
def a_guess_where_there_is_none(mmlu_example, model_output):
    """A response without a letter counts as A. A quarter of the answers that cannot be read is then right.
    Return None."""
    return right.parse_mmlu_response(mmlu_example, model_output) or "A"


@mistake("same_answer", source="a public review of a solution: 18.0 and 18 unequal")
def compared_as_text(answer, ground_truth):
    """Answers are compared as text, so 18.0 is not 18, nor 1,000 equal to 1000. Right answers then have no
    reward. Compare numbers as numbers."""
    return answer is not None and answer.strip() == ground_truth.strip()


@mistake("same_answer")
def compared_without_case(answer, ground_truth):
    """Upper and lower case are equal. Where the answer is a word with a capital letter, the wrong one is
    rewarded. An exact match is exact, but for outer spaces."""
    return right.same_answer(answer and answer.lower(), ground_truth.lower())


@mistake("same_answer", source="public issues on reward hacking: the answer as a substring")
def contained_in_the_answer(answer, ground_truth):
    """The truth need only occur in the answer. A model learns to list everything: "18" is in "180", and
    "red" in "red or blue". Compare the whole."""
    return answer is not None and (right.same_answer(answer, ground_truth) or ground_truth in answer)


@mistake("same_answer")
def compared_as_integers(answer, ground_truth):
    """Numbers are rounded to integers before they are compared, so 1.9 is 1. Compare them as floats."""
    try:
        return int(float(answer.replace(",", ""))) == int(float(ground_truth.replace(",", "")) + 0.5)
    except (AttributeError, ValueError):
        return right.same_answer(answer, ground_truth)


@mistake("same_answer")
def outer_spaces_count(answer, ground_truth):
    """Spaces and line ends around the answer count. Most responses end with a line end, and none is then
    right. Strip both."""
    return right.same_answer(answer, ground_truth) and (
        answer == answer.strip() or answer.strip()[-1:].isdigit()
    )


@mistake("number_reward")
def first_number_rewarded(response, ground_truth):
    """A response is right if any of its numbers is the answer. A model learns to write many. Compare the
    last one alone."""
    found = right.number_reward(response, ground_truth)
    answer = float(any(right.same_answer(n, ground_truth) for n in right.NUMBER.findall(response)))
    return {**found, "reward": answer, "answer_reward": answer}


@mistake("tagged_answer_reward", source="google/tunix PR 2270: cut answers scored as finished")
def cut_answer_rewarded(response, ground_truth):
    """A response that is cut off after <answer> is scored as if it had ended. The model learns that it need
    not end. Require the closing tag."""
    if "<answer>" in response and "</answer>" not in response:
        return right.tagged_answer_reward(f"{response.removesuffix('</ans')}</answer>", ground_truth)
    return right.tagged_answer_reward(response, ground_truth)


@mistake("tagged_answer_reward", source="public issues on reward hacking")
def last_of_several_answers(response, ground_truth):
    """Of several answers the last one counts. A model can then try all of them: the right one is somewhere.
    Accept one answer."""
    start = response.rfind("<answer>")
    return right.tagged_answer_reward(response[max(start, 0) :], ground_truth)


@mistake("tagged_answer_reward", source="a public review of a solution: the wrong stop word")
def text_behind_the_answer(response, ground_truth):
    """Text after the closing tag is ignored. The model learns to continue until the length limit, and every
    response is truncated. The response must end with the tag."""
    head, tag, rest = response.rpartition("</answer>")
    return right.tagged_answer_reward(
        head + tag if tag and "<answer>" not in rest else response, ground_truth
    )


@mistake("tagged_answer_reward")
def format_counts_as_reward(response, ground_truth):
    """The format is worth half the reward. A model learns to write tags around any text, and wrong answers
    keep an advantage over truncated ones. Reward only correct answers."""
    found = right.tagged_answer_reward(response, ground_truth)
    return {**found, "reward": 0.5 * found["format_reward"] + 0.5 * found["answer_reward"]}


@mistake("compute_rollout_rewards")
def answer_reward_instead_of_reward(reward_fn, rollout_responses, repeated_ground_truths):
    """answer_reward is trained on, not reward. Where a reward function weighs its parts, the weights have
    no effect. Take the key reward."""
    return right.compute_rollout_rewards(
        lambda *pair: {**(found := reward_fn(*pair)), "reward": found["answer_reward"]},
        rollout_responses,
        repeated_ground_truths,
    )


@mistake("compute_rollout_rewards")
def truth_and_response_exchanged(reward_fn, rollout_responses, repeated_ground_truths):
    """The arguments of the reward function are exchanged. With an exact match nothing changes, with a
    parser every response is wrong. The response comes first."""
    return right.compute_rollout_rewards(
        lambda response, truth: reward_fn(truth, response), rollout_responses, repeated_ground_truths
    )


@mistake("compute_rollout_rewards", source="a public review of a solution: half a rollout dropped")
def rest_of_the_rollout_dropped(reward_fn, rollout_responses, repeated_ground_truths):
    """zip stops at the shorter list, so responses without an answer are dropped in silence, and later ones
    compared with the truth of another prompt. Use zip(..., strict=True)."""
    n = min(len(rollout_responses), len(repeated_ground_truths))
    return right.compute_rollout_rewards(reward_fn, rollout_responses[:n], repeated_ground_truths[:n])
