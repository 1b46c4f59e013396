"""Reward functions of a Python file: what is loaded, and what is refused with a message.

uv run pytest tests/test_user_reward.py
"""

import re

import pytest

from llm_basics.inference import user_reward

SCORE = "def score(prompt, response, expected):\n"


@pytest.fixture
def file(tmp_path):
    def write(body):
        path = tmp_path / "my_reward.py"
        path.write_text(body)
        return str(path)

    return write


def test_a_reward_is_called_with_prompt_response_and_expected(file):
    path = file(SCORE + "    return len(prompt) + 10 * len(response) + 100 * (expected is None)\n")
    reward = user_reward.load(f"{path}:score")
    assert reward("ab", "c", "d") == 12.0
    assert reward("ab", "c") == 112.0
    assert re.fullmatch(r"my_reward.py \([0-9a-f]{12}\):score", reward.origin)


def test_the_name_may_be_left_out_and_may_be_another(file):
    path = file(
        SCORE
        + "    return True\n\ndef other(prompt, response, expected=None, scale=2.0):\n    return scale\n"
    )
    assert user_reward.load(path)("", "") == 1.0
    assert user_reward.load(f"{path}:other")("", "") == 2.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def value(prompt, response, expected):\n    return 1\n",
            "must define score .* but it defines value",
        ),
        ("score = 3\n", "must be a function of .prompt, response, expected., got 3"),
        (
            "def score(response, expected):\n    return 1\n",
            r"must have the parameters .*, got \(response, exp",
        ),
        ("def score(response, prompt, expected):\n    return 1\n", "must have the parameters"),
        ("def score(prompt, response, expected, k):\n    return 1\n", "must have the parameters"),
        ("import nothing_like_it\n" + SCORE + "    return 1\n", "my_reward.py:1 could not be run"),
        ("def score(:\n", "is not Python"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(file, body, message):
    with pytest.raises(ValueError, match=message):
        user_reward.load(file(body))


@pytest.mark.parametrize("reference", ["score", "my_reward.txt:score", "my_reward.py:", "my_reward.py:a b"])
def test_a_reference_that_is_no_function_of_a_file_is_refused(reference):
    with pytest.raises(ValueError, match=r"as in my_reward\.py:score, got"):
        user_reward.load(reference)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        user_reward.load(f"{tmp_path}/none.py:score")


@pytest.mark.parametrize("value", ["None", "'1.0'", "float('nan')", "float('inf')", "[1.0]", "1j"])
def test_a_result_must_be_a_finite_number(file, value):
    reward = user_reward.load(file(SCORE + f"    return {value}\n"))
    with pytest.raises(ValueError, match="must return a finite number, got .*for the response 'r'"):
        reward("p", "r", None)


def test_an_error_in_the_function_names_its_line(file):
    reward = user_reward.load(file(SCORE + "    x = 1\n    return x / 0\n"))
    with pytest.raises(ValueError, match=r"my_reward\.py:3 failed in score: ZeroDivisionError"):
        reward("p", "r", None)
