"""Reinforcement learning and preference optimization as programs.

Alone: uv run pytest tests/test_post_training.py
"""

import dataclasses
import json
import math
import os
import shutil
import signal

import pytest
import torch

from llm_basics.alignment import grpo_step, response_log_probs, rewards
from llm_basics.cli import parse
from llm_basics.core import config
from llm_basics.data import chat_template
from llm_basics.inference import engine
from llm_basics.post_training import diagnosis, distill, dpo, pairs, rl, rollouts
from llm_basics.post_training import options as post_options
from llm_basics.runs import run_dir
from llm_basics.training import job, setup, sft

SMALL = {
    "grad_accumulation_steps": 1,
    "eval_every": 3,
    "checkpoint_every": 2,
    "eval_batches": 1,
    "sample_tokens": 4,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A folder with `chat`, a model that names the first letter of a word about every other time."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "text.txt").write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(200)))
    words = [f"{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"]
    lines = [json.dumps({"prompt": f"{word}?", "completion": word[0]}) + "\n" for word in words]
    (folder / "answers.jsonl").write_text("".join(lines))
    shape = config.ModelConfig(context_length=24, d_model=32, n_layers=1, n_heads=2, vocab_size=257)
    settings = config.TrainConfig(steps=2, batch_size=4, eval_batches=1, sample_tokens=2, device="cpu")
    places = {"data_dir": str(folder / "data"), "model": shape, "train": settings}
    old = config.Config(
        data=str(folder / "text.txt"), tokenizer="bytes", run_dir=str(folder / "old"), **places
    )
    assert job.main(old) == 0
    options = parse.train_options(arguments(folder, "old", "chat"), prog="sft", preset="sft")
    settings = dataclasses.replace(options.train, **SMALL, steps=20, batch_size=8, lr=0.02)
    assert sft.main(dataclasses.replace(options, train=settings)) == 0
    return folder


def arguments(folder, source, name):
    found = ["--init_from", f"{folder}/{source}", "--data", f"{folder}/answers.jsonl", "--data_dir"]
    return [
        *found,
        f"{folder}/data",
        "--val_fraction",
        "0.4",
        "--run_dir",
        f"{folder}/{name}",
        "--train.device",
        "cpu",
    ]


def options_of(program, folder, name, settings, **changes):
    """Options as the command `program` parses them."""
    defaults = {"rl": post_options.RlConfig(), "dpo": post_options.DpoConfig()}[program]
    found = parse.train_options(arguments(folder, "chat", name), program, program, defaults=defaults)
    size = {"rl": 16, "dpo": 8}[program]
    train = dataclasses.replace(found.train, **(SMALL | {"batch_size": size, "steps": 5} | settings))
    group = dataclasses.replace(getattr(found, program), **changes)
    return dataclasses.replace(found, train=train, **{program: group})


def rl_options(folder, name, settings=(), **changes):
    small = {"group_size": 4, "max_new_tokens": 4, "record_every": 1}
    return options_of("rl", folder, name, dict(settings), **(small | changes))


def dpo_options(folder, name, settings=(), **changes):
    return options_of("dpo", folder, name, dict(settings), **({"max_new_tokens": 4} | changes))


@pytest.fixture
def home(fine_tuned, tmp_path):
    shutil.copytree(fine_tuned, tmp_path, dirs_exist_ok=True)
    return tmp_path


def weights_of(folder):
    return engine.load_run(folder)[0].state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def started(options, make):
    training, output = setup.start(options, make)
    training.output = output
    return training


# --------------------------------------------------------------------------------------------------
# Reinforcement learning


def test_rewards_teach_what_imitation_did_not(home, capsys):
    """More exact answers to held-out questions after training on rewards alone."""
    options = rl_options(
        home, "rl", {"steps": 100, "lr": 2e-3, "seed": 2, "batch_size": 32, "eval_every": 100}
    )
    assert rl.main(options) == 0
    out = capsys.readouterr().out
    counts = [int(line.split()[3]) for line in out.splitlines() if line.startswith("exact match on ")]
    before, after = counts
    assert after > before
    metrics = [entry for entry in run_dir.read_metrics(home / "rl") if "reward" in entry]
    first, last = (sum(entry["reward"] for entry in some) / 20 for some in (metrics[:20], metrics[-20:]))
    assert last > first + 0.3 and all(entry["exact"] == entry["reward"] for entry in metrics)
    # other programs read the run
    model, tokenizer = engine.load_run(home / "rl")
    prompt = torch.tensor(chat_template.render_prompt(tokenizer, [chat_template.Message("user", "cx?")]))
    (ids,) = engine.generate_batch(model, [prompt], 4, 0.0, stop_id=tokenizer.special_id("<|end|>"))
    assert tokenizer.decode(ids) in list("abcdefgh")


def test_a_step_is_that_of_the_piece(home):
    """The program and `grpo_train_step` of the course change the weights alike."""
    options = rl_options(home, "rl", {"warmup_steps": 0, "grad_accumulation_steps": 2, "batch_size": 8})
    training = started(options, rl.make)
    found = []
    sample = rollouts.sample

    def recorded(*given):
        found.extend(sample(*given))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "sample", recorded)
        batches = training.next_batches()
    end = training.tokenizer.special_id("<|end|>")
    twin = started(dataclasses.replace(options, run_dir=str(home / "twin")), rl.make)
    # not AdamW, whose first step has the sign of a gradient of any size
    for run in (training, twin):
        run.optimizer = torch.optim.SGD(run.model.parameters())
    training.train_step(batches)
    for group in twin.optimizer.param_groups:
        group["lr"] = training.optimizer.param_groups[0]["lr"]
    truths = [[*twin.tokenizer.encode_ordinary(r.case.expected[0]), end] for r in found]
    grpo_step.grpo_train_step(
        twin.model.eval(),
        Ids(),
        twin.optimizer,
        2,
        options.train.max_grad_norm,
        lambda response, truth: {"reward": float(response == truth)},
        [spelled(r.case.ids) for r in found],
        [spelled(r.ids) for r in found],
        [spelled(ids) for ids in truths],
        options.rl.group_size,
    )
    assert len({r.reward for r in found}) == 2, "the responses must differ"
    for one, other in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    for run in (training, twin):
        run.output.close()


def spelled(ids):
    return " ".join(map(str, ids))


class Ids:
    """A tokenizer of texts that are ids."""

    def encode(self, text):
        return list(map(int, text.split()))


@pytest.mark.parametrize(("program", "rank"), [("rl", None), ("dpo", None), ("rl", 2), ("dpo", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(home, monkeypatch, program, rank):
    """Weights, metrics and rollouts, after a signal and without the run that it started from.

    That one is the base of adapters.
    """
    main, make_options = {"rl": (rl.main, rl_options), "dpo": (dpo.main, dpo_options)}[program]
    changes = {"kl": 0.1, "updates": 2} if program == "rl" else {}
    adapted = {"lora": config.LoRAConfig(rank=rank)}
    options = make_options(home, "whole", {"lr": 2e-3}, **changes)
    assert main(dataclasses.replace(options, **adapted)) == 0
    options = dataclasses.replace(make_options(home, "stopped", {"lr": 2e-3}, **changes), **adapted)
    state = {"rl": rl.RlState, "dpo": dpo.DpoState}[program]
    next_batches = state.next_batches

    def batches_and_stop(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batches(self)

    with monkeypatch.context() as patch:
        patch.setattr(state, "next_batches", batches_and_stop)
        assert main(options) == 128 + signal.SIGTERM
    if rank is None:
        (home / "chat").rename(home / "gone")
    defaults = type(options)()
    assert main(parse.train_options(["--resume", str(home / "stopped")], defaults=defaults)) == 0
    assert same(weights_of(home / "whole"), weights_of(home / "stopped"))
    names = ("step", "train_loss", "reward", "margin", "kl", "val_loss", "val_exact", "val_pair_accuracy")
    both = [
        [{name: entry.get(name) for name in names} for entry in run_dir.read_metrics(home / folder)]
        for folder in ("whole", "stopped")
    ]
    assert both[0] == both[1]
    if program == "rl":
        texts = [
            {
                (entry["step"], number % 16): entry["tokens"]
                for number, entry in enumerate(map(json.loads, open(home / folder / run_dir.ROLLOUTS)))
            }
            for folder in ("whole", "stopped")
        ]
        assert texts[0] == texts[1] and max(texts[0])[0] == 5


def test_rollouts_record_what_was_trained_on(home):
    options = rl_options(home, "rl")
    training = started(options, rl.make)
    (batch,) = training.next_batches()
    lines = [json.loads(line) for line in open(home / "rl" / run_dir.ROLLOUTS)]
    assert len(lines) == 16 and {line["step"] for line in lines} == {1}
    for group in range(4):
        some = [line for line in lines if line["group"] == group]
        assert len({line["prompt"] for line in some}) == 1 and len(some) == 4
        assert sum(line["advantage"] for line in some) == pytest.approx(0, abs=1e-5)
    # each response has its own seed
    assert any(len({line["text"] for line in lines if line["group"] == g}) > 1 for g in range(4))
    # those without an advantage have no gradient
    assert batch.weight == len(batch.inputs) / 16
    trained = [line for line in lines if line["log_probs"] is not None]
    assert trained == [line for line in lines if line["advantage"] != 0]
    for line, mask in zip(trained, batch.response_mask, strict=True):
        assert len(line["log_probs"]) == len(line["tokens"]) == int(mask.sum())
    for line in lines:
        assert training.tokenizer.decode(line["tokens"]).removesuffix("<|end|>") == line["text"]
        assert line["ended"] == (line["tokens"][-1] == training.tokenizer.special_id("<|end|>"))
        assert line["reward"] == float(line["ended"] and line["text"] == line["expected"])
    sequences = [row for row in lines if row["log_probs"]]
    for line in sequences:
        prompt = chat_template.render_prompt(
            training.tokenizer, [chat_template.Message("user", line["prompt"])]
        )
        ids = torch.tensor([prompt + line["tokens"]])
        scored = response_log_probs.get_response_log_probs(training.model, ids[:, :-1], ids[:, 1:])
        expected = scored["log_probs"][0, len(prompt) - 1 :].tolist()
        assert line["log_probs"] == pytest.approx(expected, abs=1e-4)
    training.output.close()


def test_prompts_can_be_others_than_those_of_the_data(home):
    lines = [{"prompt": f"{a}{b}?", "completion": a} for a in "ax" for b in "stuvwxyz"]
    (home / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = rl.make(rl_options(home, "rl", prompts=str(home / "more.jsonl")))
    held_out = {case.question for case in training.test_cases(99)}
    questions = [case.question for case in training.prompts]
    assert "xs?" in questions and held_out & {line["prompt"] for line in lines}
    assert (
        not held_out & set(questions)
        and len(questions) + len(held_out & {f"a{b}?" for b in "stuvwxyz"}) == 16
    )
    assert {case.expected for case in training.prompts} == {"a<|end|>", "x<|end|>"}


def test_a_response_that_is_cut_off_has_no_reward(home):
    training = started(rl_options(home, "rl"), rl.make)
    case = training.prompts[0]
    answer = training.tokenizer.encode_ordinary(case.expected.removesuffix("<|end|>"))
    reward = rollouts.load_reward("exact")
    whole, cut = (rollouts.score(case, answer, ended, training.tokenizer, reward) for ended in (True, False))
    assert (whole.reward, whole.is_exact, len(whole.ids)) == (1.0, True, len(answer) + 1)
    assert (cut.reward, cut.is_exact, len(cut.ids)) == (0.0, False, len(answer))
    training.output.close()


def test_dropout_is_off_in_the_update(home):
    training = started(rl_options(home, "rl"), rl.make)
    training.model.train()
    batches = training.next_batches()
    training.model.train()
    training.train_step(batches)
    assert not training.model.training
    training.output.close()


def test_a_reward_function_of_the_user_is_used_and_checked(home, capsys):
    (home / "mine.py").write_text(
        "def score(prompt, response, expected):\n    return len(response) if prompt else 0\n"
        "def broken(prompt, response, expected):\n    return float('nan')\n"
    )
    options = rl_options(home, "rl", {"steps": 1}, reward=f"{home}/mine.py:score")
    assert rl.main(options) == 0
    lines = [json.loads(line) for line in open(home / "rl" / run_dir.ROLLOUTS)]
    assert all(line["reward"] == len(line["text"]) * line["ended"] for line in lines)
    with pytest.raises(SystemExit) as stop:
        rl.main(rl_options(home, "other", reward=f"{home}/mine.py:absent"))
    assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"broken of .* must return a finite number, got nan"):
        rl.main(rl_options(home, "third", reward=f"{home}/mine.py:broken"))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(home, monkeypatch, capsys):
    compute = rl.policy_gradient.compute_policy_gradient_loss

    def infinite(*given):
        losses, seen = compute(*given)
        return losses * math.inf, seen

    monkeypatch.setattr(rl.policy_gradient, "compute_policy_gradient_loss", infinite)
    assert rl.main(rl_options(home, "rl")) == parse.NOT_FINITE
    assert "step 1: loss" in capsys.readouterr().err
    assert same(weights_of(home / "chat"), weights_of(home / "rl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": {"group_size": 3}}, "must be divisible by rl.group_size, got 16 and 3"),
        ({"rl": {"max_new_tokens": 24}}, "rl.max_new_tokens must be below model.context_length 24"),
        ({"rl": {"max_new_tokens": 23}}, "but none of"),
        (
            {"rl": {"reward": "best"}},
            "rl.reward must be exact, number, tagged or FILE.py:FUNCTION, got 'best'",
        ),
        ({"find_lr": True}, "rl has no --find_lr"),
        ({"packing": "on"}, "rl has no --packing"),
        ({"train": {"compile": "on"}}, "rl has no --train.compile"),
    ],
)
def test_options_that_cannot_work_are_refused(home, capsys, change, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        options = rl_options(home, "rl", change.get("train", {}), **change.get("rl", {}))
        rest = {name: value for name, value in change.items() if name not in ("rl", "train")}
        rl.main(dataclasses.replace(options, **rest))
    assert message in capsys.readouterr().err + str(stop.value)
    assert not (home / "rl").exists()


def test_another_program_does_not_resume_the_run(home, capsys):
    assert rl.main(rl_options(home, "rl", {"steps": 1})) == 0
    for preset, folder, defaults, message in (
        ("sft", "rl", None, "rl is a run of rl; use python -m llm_basics.rl --resume"),
        ("dpo", "rl", post_options.DpoConfig(), "rl is a run of rl; use"),
        ("rl", "chat", post_options.RlConfig(), "chat must be a run of rl, but its config.json has no rl"),
    ):
        with pytest.raises(SystemExit):
            parse.train_options(["--resume", str(home / folder)], preset=preset, defaults=defaults)
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Findings


def groups(*texts, size=4, reward=lambda text: float(text == "a"), ended=True):
    """Rollouts of groups, whose right response is `a`."""
    case = sft.TestCase([1], "letter?", "a", "all")
    return [
        rollouts.Rollout(case, [ord(c) for c in text], text, ended, text == "a", {"reward": reward(text)})
        for group in texts
        for text in group
    ]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (groups("aaab", "bcde"), None),
        (groups("abcd", "abbb"), None),
        (groups("bcde", "fghi"), "all 4 responses of 2 of 2 groups have the same reward: the gradient is 0"),
        (groups("aaaa", "aaaa"), "the 4 responses of a group are identical in 100% of the groups"),
        (groups("abcd", "bacd", ended=False), "100% of the responses are cut off at 8 tokens"),
    ],
)
def test_a_run_that_cannot_learn_is_told_so(found, message):
    looking = diagnosis.Diagnosis(4, 8)
    findings = looking.look(1, found)
    assert (message in findings[0]) if message else not findings
    # not again at once, but after a while
    assert not looking.look(2, found)
    assert bool(looking.look(2 + diagnosis.REPEATED_AFTER, found)) == bool(message)


def test_a_reward_that_is_earned_otherwise_is_noticed():
    looking = diagnosis.Diagnosis(4, 8)

    def reward(text):
        return float("a" in text) + 0.1 * len(text)

    found = []
    for step in range(2 * diagnosis.WINDOW):
        right = [["a", "a", "b", "c"]] if step < diagnosis.WINDOW else [["a", "xa", "yxa", "c"]]
        found += looking.look(step, groups(*right, reward=reward))
    (finding,) = found
    assert "the reward rose by 0.33" in finding and "exact answers fell by 0.25" in finding
    assert "'yxa' for 'letter?'" in finding
    honest = diagnosis.Diagnosis(4, 8)
    for step in range(2 * diagnosis.WINDOW):
        right = ["a", "b", "c", "d"] if step < diagnosis.WINDOW else ["a", "a", "a", "d"]
        assert not honest.look(step, groups(right))


# --------------------------------------------------------------------------------------------------
# Preferences


def test_preferences_are_learned_from_the_models_own_mistakes(home):
    options = dpo_options(home, "dpo", {"steps": 30, "lr": 1e-3, "eval_every": 100})
    assert dpo.main(options) == 0
    metrics = [entry for entry in run_dir.read_metrics(home / "dpo") if "margin" in entry]
    assert metrics[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics[0]["margin"] == 0
    assert metrics[-1]["dpo_loss"] < 0.65 and metrics[-1]["pair_accuracy"] > 0.8
    (path,) = (home / "data").glob("pairs-*.jsonl")
    records = [json.loads(line) for line in open(path)]
    held_out = {case.question for case in started_cases(home)}
    assert records and not held_out & {record["prompt"] for record in records}
    for record in records:
        assert record["chosen"] == record["prompt"][0] != record["rejected"]
        assert rewards.exact_match_reward(record["rejected"], record["chosen"])["reward"] == 0
    # sampled once
    before = path.stat().st_mtime_ns
    dpo.make(dpo_options(home, "again"))
    assert path.stat().st_mtime_ns == before


def started_cases(home):
    options = dpo_options(home, "unused")
    return sft.SftState(*sft.prepared(options)).test_cases(10**6)


def test_pairs_of_a_file_are_split_by_prompt(home):
    lines = [{"prompt": f"{a}{b}?", "chosen": a, "rejected": b} for a in "abcdefgh" for b in "stuvwxyz"]
    (home / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dataclasses.replace(
        dpo_options(home, "dpo", {"steps": 12, "lr": 1e-3}), data=str(home / "pairs.jsonl")
    )
    assert dpo.main(options) == 0
    training = dpo.make(dataclasses.replace(options, run_dir=None))
    assert training.pairs and training.held_out_pairs
    assert len(training.pairs) + len(training.held_out_pairs) == 64
    trained = {tuple(pair.prompt) for pair in training.pairs}
    assert not trained & {tuple(pair.prompt) for pair in training.held_out_pairs}
    assert [m for m in run_dir.read_metrics(home / "dpo") if "val_pair_accuracy" in m][-1][
        "val_pair_accuracy"
    ] > 0.5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "pairs.jsonl:1 must be an object with the texts prompt, chosen, rej",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "must be an object with the texts"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "must have two different responses, got 'b' twice"),
    ],
)
def test_a_record_that_is_no_pair_is_refused(tmp_path, record, message):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    tokenizer = chat_template.with_specials(engine.tokenizers.Tokenizer.byte_level())
    with pytest.raises(ValueError, match=message):
        list(pairs.read(str(tmp_path / "pairs.jsonl"), tokenizer))


def test_preferences_need_a_fine_tuned_model(home, capsys):
    options = dataclasses.replace(dpo_options(home, "dpo"), init_from=str(home / "old"))
    with pytest.raises(SystemExit):
        dpo.main(options)
    assert "has no chat tokens; run python -m llm_basics.sft" in capsys.readouterr().err


def test_a_missing_reference_is_named(home, capsys):
    assert dpo.main(dpo_options(home, "dpo", {"steps": 2})) == 0
    (home / "dpo" / "reference.safetensors").unlink()
    arguments = ["--resume", str(home / "dpo"), "--train.steps", "3"]
    with pytest.raises(ValueError, match="reference.safetensors must hold the weights of the initial model"):
        dpo.main(parse.train_options(arguments, defaults=post_options.DpoConfig()))


# --------------------------------------------------------------------------------------------------
# Distillation


def distill_options(folder, name, **changes):
    places = ["--data", f"{folder}/text.txt", "--data_dir", f"{folder}/data", "--run_dir", f"{folder}/{name}"]
    sizes = ["--model.d_model", "16", "--model.n_layers", "1", "--model.n_heads", "2"]
    sizes += ["--model.context_length", "16", "--train.device", "cpu", "--train.batch_size", "4"]
    found = parse.train_options([*places, *sizes], defaults=post_options.DistillConfig())
    train = dataclasses.replace(found.train, **(SMALL | {"steps": 6, "sample_every": 0, "warmup_steps": 2}))
    group = post_options.DistillOptions(teacher=f"{folder}/old", **changes)
    return dataclasses.replace(found, train=train, distill=group)


def test_a_student_comes_closer_to_its_teacher(home):
    options = distill_options(home, "small", hard_weight=0.0, temperature=2.0)
    options = dataclasses.replace(options, train=dataclasses.replace(options.train, steps=40))
    assert distill.main(options) == 0
    kl = [entry["kl"] for entry in run_dir.read_metrics(home / "small") if "kl" in entry]
    assert kl[-1] < 0.8 * kl[0]
    student, tokenizer = engine.load_run(home / "small")
    assert student.config.d_model == 16 and tokenizer.vocab_size == student.config.vocab_size


def test_a_resumed_student_equals_an_uninterrupted_one(home, capsys):
    assert distill.main(distill_options(home, "whole")) == 0
    assert distill.main(distill_options(home, "stopped")) == 0
    # as if killed before the later ones
    for path in run_dir.checkpoints(home / "stopped")[:-1]:
        path.unlink()
    resumed = parse.train_options(["--resume", str(home / "stopped")], defaults=post_options.DistillConfig())
    assert distill.main(resumed) == 0
    assert same(weights_of(home / "whole"), weights_of(home / "stopped"))
    # with another teacher there is no going on
    shutil.rmtree(home / "old")
    shutil.copytree(home / "whole", home / "old")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        distill.main(resumed)
    assert "teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill": {"teacher": ""}}, "--distill.teacher must name the run of the teacher, got none"),
        ({"model": {"context_length": 32}}, "model.context_length must be at most that of the teacher, 24"),
        ({"find_lr": True}, "distill has no --find_lr"),
    ],
)
def test_a_student_that_cannot_be_trained_is_refused(home, capsys, change, message):
    options = distill_options(home, "small")
    for name, value in change.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(options, name), **value)
        options = dataclasses.replace(options, **{name: value})
    with pytest.raises(SystemExit):
        distill.main(options)
    assert message in capsys.readouterr().err
