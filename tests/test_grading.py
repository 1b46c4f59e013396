"""Grading of foreign adapters: fair to right code, clear about wrong code.

uv run pytest tests/test_grading.py
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import examiner
import grading
import pytest
import torch

from llm_basics import swap
from llm_basics.learn import judge, lessons, messages, probes, sandbox, sockets

TESTS = Path(__file__).parent
FOREIGN = TESTS / "fixtures" / "foreign"

# the steps of the public assignment
STEPS = [name for name in judge.STEPS if set(grading.adapters_of(name)) & grading.PUBLIC]


def foreign(path, name="foreign_adapters"):
    return grading.Adapters(sockets.run_file(Path(path), name))


@pytest.fixture
def theirs(tmp_path):
    """Adapters with this source."""

    def write(source):
        path = tmp_path / "adapters.py"
        path.write_text("import torch\nfrom torch.nn import functional as tF\n" + textwrap.dedent(source))
        return foreign(path, f"foreign_{abs(hash(source))}")

    return write


def names(findings):
    return {finding.probe for finding in findings}


# --------------------------------------------------------------------------------------------------
# The contract


class Recorder(sockets.Adapters):
    """Adapters without a function; records which one is asked for first."""

    def __init__(self):
        super().__init__(sys)


@pytest.mark.parametrize("name", judge.STEPS)
def test_every_probe_names_the_sentence_it_stands_on_or_says_why_it_is_asked(name):
    for probe in judge.load(name).probes:
        recorder = Recorder()
        with pytest.raises(sockets.MissingAdapter):
            probe.observe(recorder)
        if recorder.used <= grading.PUBLIC:
            assert bool(probe.contract) != bool(probe.beyond), probe.about
            assert not probe.contract or probe.contract in grading.CONTRACT, probe.about
        else:
            others = ", ".join(recorder.used - grading.PUBLIC)
            assert not probe.contract and not probe.beyond, (
                f"{probe.about}: the public assignment has no {others}, so give neither contract nor beyond"
            )


def test_the_contract_has_the_functions_of_the_public_assignment():
    assert len(STEPS) == 34
    assert len(grading.PUBLIC) == 50
    used = {name for step in judge.STEPS for name in grading.adapters_of(step)}
    assert used >= grading.PUBLIC
    stood_on = {probe.contract for name in STEPS for probe in judge.load(name).probes}
    assert stood_on - {""} == grading.CONTRACT.keys() - {"gradients", "in place", "dtype"}


# --------------------------------------------------------------------------------------------------
# Right implementations: nothing but advice

# what is advice for habits of public solutions
ADVICE = {
    "linear": {"several leading dimensions", "a single vector"},
    "embedding": {
        "several leading dimensions, and an id more than once",
        "a single id",
        "infinity and NaN in a row that no id selects",
    },
    "softmax": {"sum of the probabilities of four equal scores", "70,000 equal scores in float16"},
    "cross_entropy": {
        "three sequences of four tokens, without an error",
        "three sequences of four tokens",
        "a vocabulary of 70,000 in float16",
    },
    "silu": {"the gradient of large numbers"},
    "swiglu": {"the gradient of gates of 100 and more", "several leading dimensions"},
    "rms_norm": {"float16 numbers of 300 and more"},
    "rope": {"float16 numbers"},
    "attention": {
        "no mask",
        "one mask for all heads",
        "float16 numbers with a mask",
        "a fully masked row gives zeros",
    },
    "multi_head": {
        "several leading dimensions",
        "RoPE, positions not given: from 0",
        "RoPE, positions for each sequence",
    },
    "block": {"tiny inputs, where the eps of the norms matters"},
    "transformer": set(),
    "adamw": {
        "three parameter groups with different options",
        "four parameter groups, the first with five weights, each with its weight decay",
        "in-place updates",
        "a step that is given a closure",
        "eps added to the corrected root, not before the correction",
        "the decay applies to the old weight, not to the step",
    },
    "clipping": {"no weight with a gradient", "gradients in place"},
    "schedule": {"no warmup"},
    "batches": {"a batch for another device", "a text far larger than memory"},
    "bpe": {
        "training ends when no pair is left",
        "line ends are learned as they are in the file",
        "special tokens may share a prefix",
        "no special tokens",
        "the order of ids: special tokens, bytes, merges as learned",
    },
    "tokenizer": {
        "an empty list of special tokens",
        "an empty list of merges",
        "a stream of lines gets the ids of the whole text",
        "a stream split within words and spaces",
        "a stream split within a special token",
        "a stream with a special token that contains a space",
        "arguments are not modified",
    },
    "flash_attention": {"no tensor of queries x keys, with 160 of each"},
    "data_parallel": {
        "a parameter that one rank uses and the other does not",
        "buffers follow rank 0 in training, and evaluation on one rank does not wait",
        "gradients accumulated over three batches under no_sync, twice",
    },
    "sharded_optimizer": {
        "each rank keeps the state of its share alone",
        "groups with settings of their own, a schedule, and a group that is added",
        "resumed from state_dict",
    },
    "fsdp": {
        "odd sizes, tied and frozen weights, ranks with different initial weights",
        "memory of weights and state, and when weights are gathered and freed",
        "large gradients in float16 are reduced in float32",
    },
    "response_log_probs": {
        "a tokenizer that marks the beginning of a text",
        "a model that returns logits",
        "infinite where it is masked",
        "a row that is masked wholly",
    },
    "rewards": {
        "decimals, and a full stop after the number",
        "commas of thousands",
        "negative numbers",
        "a letter alone",
        "more responses than answers",
    },
    "advantages": set(),
    "policy_gradient": {
        "the fraction of the response that is clipped",
        "masked positions of an older policy that are infinite",
        "an empty response",
    },
    "grpo_step": {
        "gradients of an earlier backward pass",
        "four microbatches of six responses",
        "a model with dropout, in evaluation",
        "rewards, the norm before clipping, entropy and clipped tokens",
        "old log-probabilities of another width",
    },
    "dpo": {
        "models that return logits",
        "weights of the reference with a gradient",
        "blank lines in the file",
        "an item after the last one",
    },
    "masking": {
        "a plus in the name",
        "a hyphen in the domain",
        "a long last label",
        "dots in a number",
        "a country code",
        "parentheses around a number",
        "a longer row of digits",
        "decimals",
        "numbers above 255",
        "five numbers",
    },
    "gopher": {"Cyrillic"},
    "exact_lines": {
        "a last line without its line feed",
        "line ends of Windows",
        "a folder that does not exist yet",
    },
    "minhash": {
        "the first of three copies",
        "empty files",
        "a similarity of exactly the threshold",
        "a folder that does not exist yet",
    },
    "checkpoint": {
        "a checkpoint that lacks one of the model's weights",
        "a checkpoint with a weight that the model does not have",
    },
}


# steps of the public systems assignment that are trained on two ranks, and of those of alignment and data
HABITS = dict.fromkeys(("data_parallel", "sharded_optimizer", "fsdp"), "systems.py")
HABITS |= dict.fromkeys(
    ("response_log_probs", "rewards", "advantages", "policy_gradient", "grpo_step", "dpo"),
    "alignment.py",
)
HABITS |= dict.fromkeys(("masking", "gopher", "exact_lines", "minhash"), "quality.py")


@pytest.mark.parametrize("name", [name for name in STEPS if name != "flash_triton"])
def test_habits_of_public_solutions_are_advice_with_a_reason(name):
    verdict = grading.grade(judge.load(name), foreign(FOREIGN / HABITS.get(name, "habits.py")))
    assert verdict.status == "passed" and not verdict.failures, verdict.failures
    assert (1 if name in HABITS else 3) <= verdict.n_passed == verdict.n_probes and not verdict.missing
    assert names(verdict.advice) == ADVICE[name]
    assert all(len(finding.ground) > 30 and finding.difference for finding in verdict.advice)


@pytest.mark.parametrize("name", STEPS)
def test_our_pieces_pass_as_foreign_ones(name):
    verdict = grading.grade(judge.load(name), foreign(TESTS / "adapters.py"))
    assert verdict.status == "passed" and verdict.n_passed == verdict.n_probes
    assert not verdict.failures and not verdict.advice and not verdict.missing and not verdict.notes


@pytest.mark.parametrize("name", [*STEPS, "gelu", "layer_norm"])
def test_functions_of_torch_pass(name):
    verdict = grading.grade(judge.load(name), foreign(FOREIGN / "torch_functions.py"))
    assert verdict.status in (("passed", "missing") if name in STEPS else ("advice",))
    assert not verdict.failures and set(verdict.missing) <= grading.PUBLIC


# --------------------------------------------------------------------------------------------------
# Wrong implementations


def test_no_failure_hides_another(theirs):
    adapters = theirs(
        """
        def run_softmax(in_features, dim):
            e = in_features.exp()
            return e / e.sum(-1, keepdim=True)
        """
    )
    verdict = grading.grade(judge.load("softmax"), adapters)
    assert verdict.status == "failed" and (verdict.n_passed, verdict.n_probes) == (4, 11)
    assert {"along the middle of three axes", "scores around 1000"} < names(verdict.failures)
    assert {finding.ground for finding in verdict.failures} == {grading.CONTRACT["softmax"]}
    assert "(4 of 11 probes passed)" in messages.message(verdict, "lesson: ...")
    # the assignment does not have it, and the file neither
    assert verdict.missing == ()


def test_a_mistake_is_named_beside_habits(theirs):
    adapters = theirs(
        """
        def run_rope(d_k, theta, max_seq_len, x, positions):
            angles = positions[..., None] * theta ** -(torch.arange(0, d_k, 2) / d_k)
            (first, second), cos, sin = x.float().chunk(2, dim=-1), angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
        """
    )
    verdict = grading.grade(judge.load("rope"), adapters)
    assert verdict.status == "failed" and verdict.sure
    assert verdict.mistake.name == "halves rotated instead of pairs"


@pytest.mark.parametrize(
    "body, failed, advised",
    [
        ("return tF.silu(in_features.detach())", "gradients", None),
        ("return in_features.mul_(torch.sigmoid(in_features))", "in place", None),
        ("return tF.silu(in_features).double()", None, "dtype"),
    ],
)
def test_what_a_probe_observes_beside_the_output_has_a_sentence_of_its_own(theirs, body, failed, advised):
    adapters = theirs(f"def run_silu(in_features):\n    in_features = in_features\n    {body}\n")
    verdict = grading.grade(judge.load("silu"), adapters)
    assert verdict.status == ("failed" if failed else "passed")
    assert (failed is None) or grading.CONTRACT[failed] in {f.ground for f in verdict.failures}
    assert (advised is None) or grading.CONTRACT[advised] in {f.ground for f in verdict.advice}


@pytest.mark.parametrize(
    "source",
    [
        "@torch.no_grad()\ndef run_silu(in_features):\n    return tF.silu(in_features)\n",
        "def run_silu(x):\n    with torch.no_grad():\n        y = tF.silu(x)\n    return y.to('cpu')\n",
        "def run_silu(in_features):\n    with torch.inference_mode():\n        return tF.silu(in_features)\n",
        "def run_silu(in_features):\n    return tF.silu(in_features).detach()\n",
        "def call(x):\n    with torch.no_grad():\n        return tF.silu(x)\n"
        "def run_silu(in_features):\n    return call(in_features)\n",
    ],
)
def test_adapters_that_compute_without_gradients_are_told_so(theirs, source):
    verdict = grading.grade(judge.load("silu"), theirs(source))
    assert verdict.status == "passed" and not verdict.advice
    assert verdict.notes == ("run_silu computes without gradients, so they are not checked",)


def test_weights_copied_without_gradients_do_not_excuse_a_detached_piece(theirs):
    adapters = theirs(
        """
        def run_linear(d_in, d_out, weights, in_features):
            layer = torch.nn.Linear(d_in, d_out, bias=False)
            with torch.no_grad():
                layer.weight.copy_(weights)
            return layer(in_features.detach())
        """
    )
    verdict = grading.grade(judge.load("linear"), adapters)
    assert verdict.status == "failed" and not verdict.notes
    assert {finding.ground for finding in verdict.failures} == {grading.CONTRACT["gradients"]}


@pytest.mark.parametrize(
    "weight, mistake",
    [
        ("layer.weight", None),
        ("layer.weight.detach()", "weight detached"),
        ("(2 * layer.weight - layer.weight.detach())", "weight gradient doubled"),
    ],
)
def test_gradients_of_the_weights_of_a_foreign_layer_are_advice(theirs, weight, mistake):
    adapters = theirs(
        f"""
        def run_linear(d_in, d_out, weights, in_features):
            layer = torch.nn.Linear(d_in, d_out, bias=False)
            layer.load_state_dict({{"weight": weights}})
            return in_features @ {weight}.T
        """
    )
    verdict = grading.grade(judge.load("linear"), adapters)
    assert verdict.status == "passed"
    assert names(verdict.advice) == ({"the gradient of the weight"} if mistake else set())
    assert (verdict.mistake and verdict.mistake.name) == mistake


def test_a_stub_and_a_missing_function_leave_the_rest_of_a_step(theirs):
    adapters = theirs("def run_multihead_self_attention(*_):\n    raise NotImplementedError\n")
    verdict = grading.grade(judge.load("multi_head"), adapters)
    assert verdict.status == "not started"
    assert verdict.missing == ("run_multihead_self_attention", "run_multihead_self_attention_with_rope")
    verdict = grading.grade(judge.load("gelu"), adapters)
    assert verdict.status == "missing" and not verdict.missing


# --------------------------------------------------------------------------------------------------
# Time


def test_a_time_out_has_a_status_of_its_own(theirs, monkeypatch):
    monkeypatch.setattr(probes, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(grading, "LATER_SECONDS", 0.1)
    slow = "def run_silu(in_features):\n    while in_features.dim() > 1:\n        pass\n"
    adapters = theirs(slow + "    return tF.silu(in_features)\n")
    verdict = grading.grade(judge.load("silu"), adapters)
    assert verdict.status == "timed out" and (verdict.n_passed, verdict.n_probes) == (2, 3)
    assert [finding.timed_out for finding in verdict.failures] == [True]
    verdict = grading.grade(judge.load("silu"), theirs(slow + "    return in_features\n"))
    assert verdict.status == "failed" and [f.timed_out for f in verdict.failures] == [False, True, False]


def test_a_block_that_waits_has_longer_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(sandbox, "slowdown", lambda: 100.0)
    with sandbox.time_limit(0.1):
        time.sleep(0.4)
    monkeypatch.setattr(sandbox, "slowdown", lambda: 1.0)
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        time.sleep(60)


def test_the_limit_counts_the_time_of_the_processor(monkeypatch):
    # a machine that gives half of the processor, which is not seen when it is measured
    monkeypatch.setattr(sandbox, "slowdown", lambda: 1.0)
    monkeypatch.setattr(sandbox.time, "process_time", lambda: time.monotonic() / 2)
    with sandbox.time_limit(0.4):
        time.sleep(0.6)
    # and one that is slow, but gave all of the processor
    monkeypatch.setattr(sandbox, "slowdown", lambda: 100.0)
    monkeypatch.setattr(sandbox.time, "process_time", time.monotonic)
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        time.sleep(5)


def test_limits_may_stand_in_one_another():
    done = []
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        with sandbox.time_limit(30.0):
            time.sleep(0.4)
            done.append("inner block, whose limit is not exceeded")
        time.sleep(60)
    with sandbox.time_limit(30.0):
        with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.05):
            time.sleep(60)
        time.sleep(0.3)
        done.append("outer block")
    assert len(done) == 2


@pytest.mark.parametrize("name", ["adamw", "train_step", "transformer", "checkpoint"])
def test_what_optimizers_import_is_loaded_with_the_step(name):
    source = Path(judge.mistakes.__path__[0], f"{name}.py").read_text()
    assert "import torch._dynamo" in source or "torch.optim.AdamW(model" in source
    judge.load(name)
    assert "torch._dynamo" in sys.modules


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.fixture
def restored_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(os.environ, "PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def test_worker_processes_see_the_version_and_the_adapters(tmp_path, restored_path):
    for folder in ("tests", "their_basics"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "their-basics"\nversion = "1.0.6"\n')
    (tmp_path / "their_basics" / "__init__.py").write_text(
        'import importlib.metadata\n__version__ = importlib.metadata.version("their-basics")\n'
    )
    path = tmp_path / "tests" / "adapters.py"
    path.write_text(
        "import their_basics\nfrom .common import EPS\n"
        "def run_silu(in_features):\n    return in_features + EPS\n"
    )
    (tmp_path / "tests" / "common.py").write_text("EPS = 0\n")
    adapters = grading.load_adapters(path)
    assert adapters.run_silu(3) == 3 and adapters.run_silu.__module__ == "tests.adapters"
    assert importlib.metadata.version("their_basics") == "1.0.6"
    program = "import their_basics, tests.adapters; print(their_basics.__version__)"
    worker = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path.parent
    )
    assert worker.stdout == "1.0.6\n", worker.stderr


# --------------------------------------------------------------------------------------------------
# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report on a file with a failure, advice and gaps."""
    folder = tmp_path_factory.mktemp("report")
    source = (FOREIGN / "habits.py").read_text()
    source = source.replace('"replace"', '"ignore"').replace("-1e9", "-10.0")
    (folder / "adapters.py").write_text(source.replace("def run_linear", "def run_lin"))
    adapters = foreign(folder / "adapters.py", "reported_adapters")
    verdicts = {
        name: grading.grade(judge.load(name), adapters) for name in ("linear", "attention", "tokenizer")
    }
    grading.write(folder / "r.json", "theirs", verdicts, {"tokenizer": 1.25}, {"linear": ["a.py:3 uses b"]})
    return folder


def test_the_report_has_the_fields_that_the_documentation_describes(report):
    found = json.loads((report / "r.json").read_text())
    assert found.keys() == {"implementation", "steps"} and list(found["steps"]) == [
        "linear",
        "attention",
        "tokenizer",
    ]
    page = (TESTS.parent / "docs" / "grading.md").read_text()
    table = page[page.index("| field of a step |") :].partition("\n\n")[0]
    fields = re.findall(r"^\| `(\w+)`", table, re.M)
    for step in found["steps"].values():
        assert list(step) == fields
        for finding in step["failures"] + step["advice"]:
            assert list(finding) == ["probe", "difference", "timed_out", "ground"]
    statuses = [step["status"] for step in found["steps"].values()]
    assert statuses == ["missing", "failed", "failed"]
    assert found["steps"]["linear"]["missing"] == ["run_linear"]
    assert 10 < found["steps"]["tokenizer"]["passed"] == found["steps"]["tokenizer"]["probes"] - 1


def test_the_page_shows_failures_first_and_each_probe_once(report):
    page = (report / "r.md").read_text()
    assert page.startswith("# theirs: 0 of 2 steps passed\n")
    header, _, *rows = re.findall(r"^\|.*\|$", page, re.M)
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns == "step result,probes passed,mistake,advice,time / reference,ready-made parts".replace(
        "step result", "step,result"
    ).split(",")
    assert len(rows) == 3
    section = page[page.index("## tokenizer") :]
    assert section.count("an incomplete multi-byte character is decoded to U+FFFD") == 1
    assert section.index("contract: ") < section.index("advice, beyond the contract: ")
    assert grading.CONTRACT["decoding"] in section
    assert "run_gelu" not in page


def test_long_values_are_shown_from_their_first_difference():
    right, found = "a" * 200 + "\n" + "b" * 200, "a" * 200 + "\r" + "b" * 200
    probe = dataclasses.replace(judge.load("silu").probes[0], words=None)
    (line,) = messages.differences(probe, {"result": right}, {"result": found})
    assert r"\nbbb" in line and r"\rbbb" in line and len(line) < 180


def test_line_ends_in_differences_are_escaped(monkeypatch):
    step = judge.load("silu")
    monkeypatch.setattr(messages, "differences", lambda *_: iter(["one\r\ntwo"]))
    assert judge.finding(step, 0, {"error": "E"}).difference == (r"one\r\ntwo",)


def test_a_difference_is_shown_whole_or_not_at_all():
    long = "expected " + "x" * 90 + " and " + "y" * 90 + " there"
    finding = judge.Finding("a probe", (long, long, long))
    text = messages.message(judge.Verdict("silu", "failed", (finding,), 1, 2), "next")
    assert "[...]" not in text and text.count("y" * 90 + " there") == 2
    assert max(map(len, text.splitlines())) <= messages.LINE


def examiner_of(path, mine=None, report=None):
    """The examiner of an adapters file, as pytest makes it of its options."""
    options = {"--adapters": str(path), "--mine": mine, "--report": report}
    return examiner.Examiner(types.SimpleNamespace(getoption=options.get))


@pytest.mark.parametrize("name", judge.STEPS)
def test_a_failed_step_points_to_what_exists(name):
    """`checkpoint` has no lesson and no hints."""
    for mine, path in ((None, FOREIGN / "habits.py"), ("mine.py", TESTS / "adapters.py")):
        text = examiner_of(path, mine).next_step(name)
        if name in lessons.ORDER:
            assert f"llm_basics.learn {'hint' if mine else 'show'} {name}" in text
        else:
            assert "learn" not in text and (TESTS.parent / text.split()[-1]).is_file()


def test_the_examiner_leaves_out_what_is_not_public(tmp_path, restored_path):
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "adapters.py"
    path.write_text("def run_silu(in_features):\n    return in_features.sigmoid() * in_features\n")

    under_test = examiner_of(path, report=str(tmp_path / "r.json"))
    # and the second course, of which it has nothing
    for name in ("silu", "gelu", "rope", "layer_norm", "flash_attention"):
        under_test.judged(name)
    with swap.restored():
        under_test.write()
    steps = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert list(steps) == ["silu", "rope"] and steps["silu"]["time_relative_to_reference"] > 0
    assert steps["rope"]["missing"] == ["run_rope"]


def test_ready_made_parts_are_found_through_imports_only(tmp_path):
    for folder in ("tests", "scratch", "pkg"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scratch" / "compare.py").write_text(
        "import torch\ndef silu(x):\n    return torch.softmax(x, 0)\n"
    )
    (tmp_path / "pkg" / "ops.py").write_text(
        "import torch\n"
        "def mine(x, d):\n    return x.softmax(d)\n"
        "def silu(x):\n    return x * torch.sigmoid(x)\n"
    )
    adapters = tmp_path / "tests" / "adapters.py"
    adapters.write_text(
        "def run_softmax(x, dim):\n    from pkg.ops import mine as my\n    return my(x, dim)\n"
        "def run_silu(x):\n    from pkg.ops import silu\n    return silu(x)\n"
    )
    assert grading.ready_made_uses(adapters) == {"softmax": ["pkg/ops.py:3 uses the tensor method softmax"]}


def test_tensors_elsewhere_and_numbers_of_numpy_are_equal():
    import numpy as np

    assert messages.same([np.int64(3), np.float32(0.5)], [3, 0.5], 1e-4, 1e-5)
    assert not messages.same(np.int64(3), 4, 1.0, 1.0) and not messages.same(True, 1, 0.0, 0.0)
    assert messages.same(torch.ones(2), torch.ones(2).half(), 0.0, 0.0)
