"""Best of n and the majority of n samples: what is kept, in generate, chat and evaluate.

uv run pytest tests/test_selection.py
"""

import dataclasses
import json

import pytest
import torch

from llm_basics import swap
from llm_basics.cli import commands, generation_options, parse
from llm_basics.core import functional as F
from llm_basics.data import chat_template
from llm_basics.evaluation import compare_models, exact_answers
from llm_basics.inference import chat_session, engine, samples, selection

PLAIN = ["--device=cpu", "--fast=off", "--max_new_tokens=8", "--temperature=1.5"]


@pytest.fixture
def folder(untrained_run):
    return str(untrained_run("selection"))


@pytest.fixture
def chat_folder(untrained_run):
    return str(untrained_run("selection-chat", chat_template.SPECIALS))


@pytest.fixture
def reward(tmp_path):
    """A reward that prefers the text with the most different characters, and knows the right answer."""
    path = tmp_path / "my_reward.py"
    path.write_text(
        "def score(prompt, response, expected):\n"
        "    return len(set(response)) if expected is None else float(response == expected)\n"
    )
    return f"{path}:score"


def program(main, config, *arguments):
    return main(parse.program_options(config, arguments, "test"))


def candidate(text, mean=0.0, seed=0):
    return selection.Candidate(text, seed, mean, is_finished=True)


# --------------------------------------------------------------------------------------------------
# Choosing


def test_the_highest_mean_log_probability_is_best():
    found = [candidate("a", -2.0, 5), candidate("b", -0.5, 6), candidate("c", -0.7, 7)]
    choice = selection.choose(found, generation_options.SelectionOptions(best_of=3))
    assert choice.candidate.text == "b"
    assert str(choice) == "best of 3, mean log probability -0.5, seed 6"


def test_the_most_frequent_answer_has_its_share_and_the_first_of_equals_wins():
    options = generation_options.SelectionOptions(majority=5)
    texts = ["7", "8", " 8\n", "9", "7"]
    choice = selection.choose([candidate(text, seed=i) for i, text in enumerate(texts)], options)
    assert (choice.candidate.seed, choice.figures) == (0, {"majority": 5, "share": 0.4})
    choice = selection.choose([candidate(text) for text in texts[1:4]], options)
    assert choice.candidate.text == "8" and choice.figures["share"] == 2 / 3


# --------------------------------------------------------------------------------------------------
# Samples


def test_candidates_are_the_samples_of_their_seeds_with_the_log_probability_of_the_model(folder):
    model, tokenizer = engine.load_run(folder)
    options = generation_options.SamplingOptions(8, temperature=1.5, top_k=20)
    prompt = engine.prompt_tokens(model, tokenizer, "ab")
    # more than a batch
    seeds = list(range(3, 3 + selection.BATCH_SIZE + 2))
    found = selection.sample(model, tokenizer, prompt, seeds, options, tokenizer.end_of_text_id)
    assert [each.seed for each in found] == seeds and len({each.text for each in found}) > 10
    for each in found[:2] + found[-1:]:
        plain = engine.generate_batch(
            model, [prompt], 8, 1.5, 20, generators=[torch.Generator().manual_seed(each.seed)],
            stop_id=tokenizer.end_of_text_id,
        )[0]  # fmt: skip
        assert each.text == "".join(engine.complete(model, tokenizer, "ab", 8, 1.5, 20, seed=each.seed))
        assert each.is_finished == (len(plain) < 8)
        ids = plain + [tokenizer.end_of_text_id] * each.is_finished
        with torch.no_grad():
            scores = F.log_softmax(model(torch.cat([prompt, torch.tensor(ids)])[None])[0, len(prompt) - 1 :])
        mean = sum(float(scores[i, id]) for i, id in enumerate(ids)) / len(ids)
        assert each.mean_log_probability == pytest.approx(mean, rel=1e-4)


def test_generate_keeps_one_of_the_samples(folder, capsys, reward):
    command = [folder, "--prompt=ab", *PLAIN]
    assert program(samples.main, commands.GenerateConfig(), *command, "--samples=6") == 0
    texts = [part.split("\n", 1)[1].rstrip("\n") for part in capsys.readouterr().out.split("--- ")[1:]]
    kept = {}
    for option in ("--best_of=6", "--majority=6", f"--best_of=6 --reward={reward}"):
        assert program(samples.main, commands.GenerateConfig(), *command, *option.split()) == 0
        captured = capsys.readouterr()
        assert captured.out.rstrip("\n") in texts
        kept[option] = captured.out.rstrip("\n").removeprefix("ab")
        assert captured.err.startswith(f"({option[2:].split('=')[0].replace('_', ' ')} 6, ")
    most = max(len(set(text.removeprefix("ab"))) for text in texts)
    assert len(set(kept[f"--best_of=6 --reward={reward}"])) == most


def test_a_file_of_prompts_has_the_figures_and_passes_what_is_expected(folder, tmp_path, capsys, reward):
    model, tokenizer = engine.load_run(folder)
    third = "".join(engine.complete(model, tokenizer, "ab", 8, 1.5, seed=2))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "ab", "expected": third}) + "\n")
    arguments = [folder, *PLAIN, f"--prompts={prompts}", f"--out={out}", "--best_of=3", f"--reward={reward}"]
    assert program(samples.main, commands.GenerateConfig(), *arguments, "--samples=2") == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert first == {
        "prompt": "ab", "expected": third, "seed": 2, "text": third, "best_of": 3, "reward": 1.0
    }  # fmt: skip
    # the second text is chosen among the next three seeds
    assert second["seed"] in (3, 4, 5)


def test_a_generate_of_user_code_is_not_bypassed(folder, capsys):
    model, tokenizer = engine.load_run(folder)
    prompt = engine.prompt_tokens(model, tokenizer, "ab")
    options = generation_options.SamplingOptions()

    def generate():
        pass

    with swap.replaced({"generate.generate": generate}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "user_pieces", lambda: {"generate.generate": "mine.py (abc)"})
        with pytest.raises(ValueError, match="generate is of your mine.py .*omit --best_of"):
            selection.sample(model, tokenizer, prompt, [0], options, 0)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (commands.GenerateConfig, {"best_of": 2, "majority": 2}, "cannot be combined with majority, got 2"),
        (commands.ChatConfig, {"best_of": 2, "majority": 3}, "cannot be combined with majority, got 2 and 3"),
        (commands.GenerateConfig, {"reward": "r.py", "majority": 2}, "reward needs best_of"),
        (commands.GenerateConfig, {"best_of": 2, "temperature": 0.0}, "temperature must be above 0 for best"),
        (commands.GenerateConfig, {"best_of": 2, "show_probs": True}, "show_probs cannot be combined"),
        (commands.GenerateConfig, {"best_of": 0}, "best_of must be at least 1, got 0"),
        (commands.EvaluateConfig, {"majority": 2}, "best_of and majority need answers"),
    ],
)
def test_options_that_exclude_each_other(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


# --------------------------------------------------------------------------------------------------
# Conversations


def test_chat_replies_with_one_of_the_samples(chat_folder, capsys):
    model, tokenizer = engine.load_run(chat_folder)
    options = commands.ChatConfig(max_new_tokens=5, temperature=1.5, majority=4, seed=7)
    session, pieces = chat_session.ChatSession(model, tokenizer, options), []
    session.reply("a", pieces.append)
    note = capsys.readouterr().err.strip()
    assert note.startswith("(majority 4, share ") and session.turns[-1].content == pieces[0]
    specials = set(tokenizer.special_tokens)
    assert not any(special in pieces[0] for special in specials)
    again = chat_session.ChatSession(model, tokenizer, options)
    again.reply("a", pieces.append)
    assert pieces[1] == pieces[0]


def test_exact_answers_of_a_file(chat_folder, tmp_path, capsys, monkeypatch):
    model, tokenizer = engine.load_run(chat_folder)
    asked = [[chat_template.Message("user", f"q{i}")] for i in range(4)]
    options = commands.EvaluateConfig(answers="x", best_of=3, majority=2, temperature=1.0, max_new_tokens=4)
    path = tmp_path / "questions.jsonl"
    texts = {f"q{i}": [f"{i}", "x", f"{i}"] if i < 2 else ["x", "x", f"{i}"] for i in range(4)}
    lines = [{"prompt": each.content, "completion": each.content[1:]} for (each,) in asked]
    path.write_text("\n".join(map(json.dumps, lines)))
    questions = exact_answers.read(str(path), tokenizer, 64, lambda: tmp_path)
    assert [(each.question, each.expected) for each in questions] == [(f"q{i}", str(i)) for i in range(4)]
    assert questions[0].ids == chat_template.render_prompt(tokenizer, asked[0])
    used = []

    def sample(model, tokenizer, prompt, seeds, *rest):
        used.extend(seeds)
        (question,) = [each.question for each in questions if each.ids == prompt.tolist()]
        means = (-3.0, -2.0, -1.0)
        # the third sample of the last question is cut off
        return [
            selection.Candidate(text, seed, mean, is_finished=(question, mean) != ("q3", -1.0))
            for text, seed, mean in zip(texts[question], seeds, means, strict=True)
        ]

    monkeypatch.setattr(selection, "sample", sample)
    found = exact_answers.evaluate(model, tokenizer, questions, options)
    shares = {"greedy": 0.0, "sample": 5 / 12, "best_of": 3 / 4, "majority": 2 / 4, "any": 3 / 4}
    assert dataclasses.asdict(found) == pytest.approx({"n_questions": 4, **shares})
    assert used == list(range(12))


def test_evaluate_prints_exact_answers(chat_folder, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    out = tmp_path / "report.json"
    arguments = [chat_folder, "--device=cpu", "--fast=off", f"--answers={questions}", "--best_of=2"]
    arguments += ["--max_new_tokens=3", f"--out={out}"]
    assert program(compare_models.main, commands.EvaluateConfig(), *arguments) == 0
    printed = capsys.readouterr().out
    assert "exact, best of n" in printed and "majority of n" not in printed
    (found,) = json.loads(out.read_text())
    assert found["report"] is None and found["exact"]["n_questions"] == 1
    assert found["exact"]["majority"] is None


def test_answers_need_a_chat_model(folder, tmp_path):
    _, tokenizer = engine.load_run(folder)
    with pytest.raises(ValueError, match="answers need a model fine-tuned on conversations"):
        exact_answers.read("held_out", tokenizer, 64, lambda: tmp_path)
