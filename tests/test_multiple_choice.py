"""Multiple-choice questions. Alone: `uv run pytest tests/test_multiple_choice.py`."""

import json
import math
import re

import pytest
import torch

from llm_basics.core import config, model, tokenizer
from llm_basics.evaluation import multiple_choice

GOOD = {"prompt": "1 + 1 =", "choices": ["2", "three"], "answer": 0}
BYTES = tokenizer.Tokenizer.byte_level()


@pytest.fixture
def lm():
    shape = config.ModelConfig(258, 24, 16, 1, 2)
    lm = model.TransformerLM(shape, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    return lm


def with_merges(*merges):
    """A tokenizer with these merges."""
    vocab = dict(enumerate([bytes([b]) for b in range(256)] + [left + right for left, right in merges]))
    return tokenizer.Tokenizer(vocab, list(merges), ["<|endoftext|>"])


# --------------------------------------------------------------------------------------------------
# The file


def test_read(tmp_path):
    path = tmp_path / "q.jsonl"
    again = {"question": "\u00e9", "choices": ["a", "b", "c"], "answer": 2, "more": None}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(again))
    assert multiple_choice.read(path) == [
        multiple_choice.Question("1 + 1 =", ("2", "three"), 0, f"{path}:1"),
        multiple_choice.Question("\u00e9", ("a", "b", "c"), 2, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", " must be JSON; Expecting property name enclosed in double quotes in column 2$"),
        (b"[1]", ": a question must be an object with fields, got list"),
        (b'"\xff"', " must be UTF-8, got byte 0xff at offset 63; fix the file$"),
        (GOOD | {"prompt": 3}, ": prompt must be a string, got 3"),
        (
            GOOD | {"question": "x"},
            ": a question must have one of prompt and question, got prompt and question",
        ),
        ({"choices": ["a", "b"], "answer": 0}, ": a question must have one of prompt and question, got none"),
        (GOOD | {"choices": ["2"]}, r": choices must be a list of at least two strings, got \['2'\]"),
        (GOOD | {"choices": None}, ": choices must be a list of at least two strings, got None"),
        (GOOD | {"choices": ["2", 3]}, ": choices must be non-empty strings, got 3"),
        (GOOD | {"choices": ["2", " "]}, ": choices must be non-empty strings, got ' '"),
        (GOOD | {"answer": 2}, ": answer must be an index from 0 to 1, got 2"),
        (GOOD | {"answer": True}, ": answer must be an index from 0 to 1, got True"),
        ({"prompt": "", "choices": ["a", "b"]}, ": a question must have answer, got prompt, choices"),
    ],
)
def test_an_invalid_line_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:2{message}"):
        multiple_choice.read(path)


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must hold one question per line, got none"):
        multiple_choice.read(tmp_path / "q.jsonl")


# --------------------------------------------------------------------------------------------------
# The tokens


def encoded(chosen, prompt, *options, **settings):
    """Context and choice as lists of decoded tokens."""
    pairs = multiple_choice.encode(chosen, multiple_choice.Question(prompt, options, 0), **settings)
    return [
        ([chosen.decode([i]) for i in before], [chosen.decode([i]) for i in scored])
        for before, scored in pairs
    ]


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_choice():
    chosen = with_merges((b" ", b"P"))
    expected = [(["i", "s"], [" P", "a"]), (["i", "s"], [" ", "L"])]
    for prompt, settings in (("is", {}), ("is ", {}), ("is", {"delimiter": " "})):
        assert encoded(chosen, prompt, "Pa", "L", **settings) == expected
    assert encoded(chosen, "is", " Pa", "L") == expected
    assert encoded(chosen, "is", "Pa", "L", delimiter="") == [(["i", "s"], ["P", "a"]), (["i", "s"], ["L"])]


def test_a_token_across_prompt_and_choice_is_scored_for_every_choice():
    """Otherwise "a" would be scored for one choice and not for the other."""
    chosen = with_merges((b"a", b"b"))
    found = encoded(chosen, "xa", "b", "c", delimiter="")
    assert found == [(["x"], ["ab"]), (["x"], ["a", "c"])]


def test_an_empty_prompt_is_the_end_of_a_document():
    assert encoded(BYTES, "", "b", "c") == [(["<|endoftext|>"], ["b"]), (["<|endoftext|>"], ["c"])]


def test_special_tokens_in_a_question_are_ordinary_text():
    ((before, scored), _) = multiple_choice.encode(
        BYTES, multiple_choice.Question("<|endoftext|>", ("<|endoftext|>", "b"), 0)
    )
    assert 256 not in before + scored


# --------------------------------------------------------------------------------------------------
# The answers


def test_predictions_equal_a_slow_computation(lm):
    questions = [
        multiple_choice.Question("one", ("two", "a long answer", "b"), 1),
        multiple_choice.Question("", ("x", "yes"), 0),
        multiple_choice.Question("a prompt that has more to it than goes into the model ", ("p", "qr"), 1),
    ]
    found = multiple_choice.evaluate(lm, BYTES, questions, batch_size=2)
    n_right = n_right_per_byte = 0
    for question, prediction in zip(questions, found.questions, strict=True):
        scores = []
        for choice in question.choices:
            space = " " if question.prompt and not question.prompt.endswith(" ") else ""
            text = [*(question.prompt.encode() or [256]), *(space + choice).encode()]
            n_scored = len(choice) + (1 if question.prompt else 0)
            score = 0.0
            read = text[-25:]
            for i in range(len(read) - n_scored, len(read)):
                with torch.no_grad():
                    score += lm(torch.tensor([read[:i]]))[0, -1].log_softmax(-1)[read[i]].item()
            scores.append(score)
        assert prediction.log_probabilities == pytest.approx(scores, rel=1e-9)
        assert scores[prediction.picked] == max(scores)
        per_byte = [s / len(c) for s, c in zip(scores, question.choices, strict=True)]
        assert per_byte[prediction.picked_per_byte] == max(per_byte)
        n_right += prediction.picked == question.answer
        n_right_per_byte += prediction.picked_per_byte == question.answer
    assert (found.accuracy, found.accuracy_per_byte) == (n_right / 3, n_right_per_byte / 3)
    assert found.n_questions == 3 and found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert found.standard_error == pytest.approx(math.sqrt(2 / 9 + 1 / 4 + 1 / 4) / 3)


def test_length_counts_in_the_sum_but_not_per_byte(lm):
    """With uniform tokens the shortest choice is the most likely; per byte all choices tie."""
    lm.ln_final.weight.data.zero_()
    found = multiple_choice.evaluate(lm, BYTES, [multiple_choice.Question("x", (" long", " s"), 1)])
    assert (found.accuracy, found.questions[0].picked) == (1.0, 1)
    assert found.questions[0].log_probabilities == pytest.approx([-5 * math.log(258), -2 * math.log(258)])
    assert found.questions[0].picked_per_byte == 0


def test_bytes_not_characters(lm):
    lm.ln_final.weight.data.zero_()
    found = multiple_choice.evaluate(
        lm, BYTES, [multiple_choice.Question("x ", ("\u00e9\u00e9\u00e9", "aaaa"), 1)]
    )
    # 7 and 5 tokens with the space: 7/6 and 5/4 a byte
    assert found.questions[0].picked_per_byte == 0


def test_a_choice_longer_than_the_context_is_named(lm):
    question = multiple_choice.Question("x", ("a" * 24, "b"), 0, "q.jsonl:7")
    with pytest.raises(ValueError, match=r"at most 24 tokens \(the context\), got 25 \(q.jsonl:7\)"):
        multiple_choice.evaluate(lm, BYTES, [question])
