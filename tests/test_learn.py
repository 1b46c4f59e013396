"""The course: from a stub to a verdict. Alone: `uv run pytest tests/test_learn.py`."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml

from llm_basics import swap, user_code
from llm_basics.cli import commands, parse
from llm_basics.core import config, model
from llm_basics.inference import engine, samples
from llm_basics.learn import __main__ as learn
from llm_basics.learn import (
    checks,
    dojo,
    judge,
    lessons,
    log_checks,
    messages,
    mistakes,
    probes,
    progress,
    race,
    stubs,
)
from llm_basics.runs import console
from llm_basics.training import job

REPOSITORY = Path(__file__).parent.parent
RIGHT = "def silu(x):\n    return x * torch.sigmoid(x)\n"
WRONG = "def silu(x):\n    return torch.sigmoid(x)\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write mine.py in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write(source):
        path = Path("mine.py")
        path.write_text("import torch\nfrom torch import nn\n" + source)
        return path

    return write


def results(path, step=None):
    return {result.step: result for result in checks.check(path, step)}


# --------------------------------------------------------------------------------------------------
# Lessons


@pytest.mark.parametrize("name", lessons.ORDER)
def test_a_lesson_is_complete(name):
    fields = yaml.safe_load((lessons.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert fields.keys() | {"later"} == {f.name for f in dataclasses.fields(lessons.Lesson)} - {"name"}
    lesson = lessons.load(name)
    assert set(lesson.pieces) <= swap.HOMES.keys() and set(lesson.optional) < set(lesson.pieces)
    assert len(lesson.hints) == 3
    assert len(re.findall(r"[.!?](?:\s|$)", lesson.idea)) == 5
    assert 1 <= lesson.predict.answer <= len(lesson.predict.options) in (3, 4)
    anchors = re.findall(r"\]\(#([\w-]+)\)", (REPOSITORY / "WORKLOG.md").read_text())
    assert lesson.worklog in anchors


def test_every_lesson_has_a_step_in_the_catalogue_and_back():
    files = {path.stem for path in Path(mistakes.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {*lessons.ORDER, "checkpoint"} >= set(judge.STEPS)
    assert {path.stem for path in lessons.FOLDER.glob("*.yaml")} == set(lessons.ORDER)


def test_a_course_is_listed_alone_or_with_the_other(mine, capsys):
    mine(RIGHT + "def online_softmax(tiles):\n    return tiles\n")
    known = progress.Progress("mine.py")
    for name in lessons.COURSES["basics"]:
        known.note(name, "passed")
    known.save()
    assert learn.main([]) == 0
    both = capsys.readouterr().out
    shown = ""
    for course, names in lessons.COURSES.items():
        assert learn.main(["--course", course]) == 0
        alone = capsys.readouterr().out
        assert alone.startswith(f"{course}\n") and alone.count("\n[") == len(names)
        assert f" of {len(names)} steps passed; next: " in alone
        shown += alone
    assert shown == both and "[x]  5 silu" in both and "[ ]  1 online_softmax" in both
    assert "steps passed; next: train the default model" in both
    assert f"0 of {len(lessons.COURSES['systems'])} steps passed; next: " in both
    with pytest.raises(SystemExit):
        learn.main(["--course", "sytems"])
    assert "systems" in capsys.readouterr().err


def test_the_next_step_is_of_a_course_that_is_begun(mine):
    mine("def online_softmax(tiles):\n    return tiles\n")
    known = progress.Progress("mine.py")
    assert known.next_step() == "online_softmax" and known.next_step("basics") == "linear"
    for name in lessons.COURSES["systems"]:
        known.note(name, "passed")
    assert known.next_step() == "linear" and known.next_step("systems") is None


def test_an_unknown_step_raises():
    with pytest.raises(ValueError, match=r"unknown step softmaxx; did you mean softmax\?"):
        lessons.load("softmaxx")


# --------------------------------------------------------------------------------------------------
# Stubs


def test_all_stubs_together_run_and_none_is_started(mine):
    for name in lessons.ORDER:
        stubs.start(name, "mine.py")
    with pytest.raises(ValueError, match="already defines softmax; delete it there to start over"):
        stubs.start("softmax", "mine.py")
    found = results("mine.py")
    assert list(found) == lessons.ORDER
    assert {result.status for result in found.values()} == {"not started"}
    for name, result in found.items():
        assert re.fullmatch(rf"{name}: (depends on \w+, which is )?not started", result.text)


def test_stubs_keep_existing_code_and_add_imports(mine):
    path = mine("# mine\n\n\n" + RIGHT)
    stubs.start("rms_norm", path)
    stubs.start("attention", path)
    source = path.read_text()
    assert RIGHT in source and "# mine" in source
    head = source[: source.index("# mine")]
    assert head.split() == (
        "import torch from jaxtyping import Bool, Float from torch import Tensor, nn".split()
    )
    assert ">>> rms_norm(torch.tensor([3.0, -3.0])" in source
    assert results(path)["silu"].status == "passed"


def test_a_stub_has_no_parameters_of_the_second_stage(mine):
    stubs.start("multi_head", "mine.py")
    stubs.start("block", "mine.py")
    source = Path("mine.py").read_text()
    assert not re.search("n_kv_heads|qk_norm|norm_eps|dropout|cache|norm_placement", source)
    assert (
        '"""Causal multi-head self-attention (arXiv 1706.03762); `rope` rotates queries and keys."""'
        in source
    )
    for name in ("multi_head", "block"):
        assert set(lessons.load(name).later) & user_code.parameters(swap.current(STAGED[name]))


# --------------------------------------------------------------------------------------------------
# Checks


STAGED = {"multi_head": "layers.MultiHeadSelfAttention", "block": "model.TransformerBlock"}
FIRST_STAGE = """
from llm_basics.core import functional as F
from llm_basics.core import layers

class MultiHeadSelfAttention(nn.Module):
    def __init__(self, d_model, n_heads, rope=None, device=None, dtype=None):
        super().__init__()
        self.n_heads, self.rope = n_heads, rope
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            setattr(self, name, layers.Linear(d_model, d_model, device=device, dtype=dtype))

    def forward(self, x, token_positions=None):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.n_heads, -1)).transpose(-3, -2) for p in projections)
        if self.rope is not None:
            positions = torch.arange(x.shape[-2]) if token_positions is None else token_positions
            q, k = (self.rope(t, positions.unsqueeze(-2)) for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output_proj(mixed.transpose(-3, -2).flatten(-2))

class TransformerBlock(nn.Module):
    def __init__(self, config, rope=None, device=None, dtype=None):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.ln1, self.ln2 = (layers.RMSNorm(config.d_model, config.norm_eps, **kind) for _ in range(2))
        self.attn = layers.MultiHeadSelfAttention(config.d_model, config.n_heads, rope=rope, **kind)
        self.ffn = layers.SwiGLU(config.d_model, config.d_hidden, **kind)

    def forward(self, x, token_positions=None):
        x = x + self.attn(self.ln1(x), token_positions)
        return x + self.ffn(self.ln2(x))
"""


def test_a_first_stage_passes_and_the_second_is_named(mine):
    found = results(mine(FIRST_STAGE))
    assert [result.status for result in found.values()] == ["passed", "passed"]
    names = "n_kv_heads, bias, qk_norm, norm_eps, dropout, cache"
    assert found["multi_head"].text == f"multi_head: passed\n  second stage, see the lesson: {names}"
    assert found["block"].text == "block: passed\n  second stage, see the lesson: cache"


def test_a_second_stage_is_checked_once_it_is_begun(mine):
    source = FIRST_STAGE.replace(
        "d_model, n_heads, rope=None", "d_model, n_heads, n_kv_heads=None, rope=None"
    )
    text = results(mine(source), "multi_head")["multi_head"].text
    assert text.startswith("multi_head: 6 query heads that share 2 key and value heads")


def test_a_first_stage_generates_what_the_reference_does(mine):
    """Without a parameter for the cache, earlier tokens are recomputed."""
    shape = config.ModelConfig(vocab_size=11, context_length=8, d_model=16, n_layers=2, n_heads=2)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    expected, found = [], []
    for tokens, source in ((expected, None), (found, FIRST_STAGE)):
        with swap.using(mine(source)) if source else contextlib.nullcontext():
            torch.manual_seed(0)
            lm = model.TransformerLM(shape)
            tokens += engine.generate_batch(lm, prompts, 9, temperature=0.0)
            caches = lm.make_kv_caches(batch=1)
            parts = [lm(part, caches=caches) for part in torch.arange(6)[None].split([3, 1, 2], dim=1)]
            assert torch.allclose(torch.cat(parts, dim=1), lm(torch.arange(6)[None]), atol=1e-5)
    assert found == expected


def test_a_mistake_is_named_and_a_correct_piece_passes(mine):
    found = results(mine(WRONG))["silu"]
    assert found.status == "failed"
    assert len(found.text.splitlines()) <= messages.MAX_LINES
    assert "mistake: " in found.text
    assert found.text.endswith("next hint: uv run python -m llm_basics.learn hint silu --mine mine.py")
    assert results(mine(RIGHT))["silu"].text == "silu: passed"


WRONG_SOFTMAX = """
def softmax(x, dim=-1):
    exponentials = (x - x.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)
"""


def test_messages(mine):
    """A message has the probe, the first wrong element, the mistake and the next command."""
    known = probes.Mistake("one too far", "functional.f", None, "It is one too far. " * 15, "seen")
    long = ("first " * 60, "b", "c", "d")
    one, short = judge.Finding("a mask", long), judge.Finding("a mask", ("b",))
    verdicts = [
        judge.Verdict("attention", "failed", (one, short), 3, 5, known, sure=True),
        judge.Verdict("attention", "failed", (short,), 4, 5, known, left=(one, short)),
        judge.Verdict("attention", "timed out", (short,), 4, 5),
        judge.Verdict("attention", "not started"),
    ]
    texts = [results(mine(WRONG_SOFTMAX))["softmax"].text, results(mine(WRONG))["silu"].text]
    texts += [messages.message(verdict, "next hint: ...") for verdict in verdicts]
    golden = (REPOSITORY / "tests" / "fixtures" / "messages.txt").read_text()
    assert "\n\n".join(texts) + "\n" == golden


def test_a_mistake_in_a_dependency_is_reported_first(mine):
    source = "def silu(x):\n    return x\n" + (
        "def swiglu(x, w1, w2, w3):\n    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T\n"
    )
    found = results(mine(source))
    assert list(found) == ["silu", "swiglu"]
    assert found["swiglu"].text.endswith("depends on silu, which does not pass; fix that first")


def test_a_missing_piece_of_a_step_is_reported(mine):
    source = "def apply_rope(x, cos, sin):\n    even, odd = x[..., 0::2], x[..., 1::2]\n"
    source += "    cos, sin = cos.to(x.dtype), sin.to(x.dtype)\n"
    source += "    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)\n"
    assert results(mine(source))["rope"].text == "rope: correct so far, rope_tables not started"


def test_a_class_that_does_all_the_work_passes(mine):
    source = (
        "class Embedding(nn.Module):\n"
        "    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))\n"
        "        nn.init.trunc_normal_(self.weight, std=1.0, a=-3, b=3)\n"
        "    def forward(self, token_ids):\n"
        "        if token_ids.min() < 0:\n            raise IndexError\n"
        "        return self.weight[token_ids.long()]\n"
    )
    assert results(mine(source))["embedding"].status == "passed"


def test_annotated_shapes_are_checked(mine):
    jaxtyping.config.update("jaxtyping_disable", False)
    source = "from jaxtyping import Float\nfrom torch import Tensor\n"
    source += (
        'def silu(x: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:\n    return x * torch.sigmoid(x)\n'
    )
    assert "TypeCheckError" in results(mine(source))["silu"].text


OWN_BACKWARD = """
class Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)
    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s + x * s * (1 - s)) * FACTOR[x.dtype == torch.float64]
def silu(x):
    return Silu.apply(x)
"""


def test_custom_backward_passes_are_compared_with_finite_differences(mine):
    assert results(mine(OWN_BACKWARD.replace("FACTOR", "(1, 1)")))["silu"].text == "silu: passed"
    # correct in float32, which the probes use
    found = results(mine(OWN_BACKWARD.replace("FACTOR", "(1, 2)")))["silu"]
    assert found.status == "failed"
    assert "the backward pass is not the derivative of the forward pass" in found.text


def test_an_infinite_loop_times_out(mine, monkeypatch):
    monkeypatch.setattr(probes, "LIMIT_SECONDS", 0.2)
    found = results(mine("def silu(x):\n    while True:\n        pass\n"))["silu"]
    assert found.status == "timed out" and "stopped: not finished after 0 s of CPU time" in found.text


def test_calling_the_reference_raises(mine):
    source = "from llm_basics.core import functional as F\nreference = F.silu\n"
    found = results(mine(source + "def silu(x):\n    return reference(x)\n"))["silu"]
    text = " ".join(found.text.split())
    assert "calls the reference functional.silu; implement silu itself" in text


def test_recursion_through_the_package_is_explained(mine):
    source = "from llm_basics.core import functional as F\ndef silu(x):\n    return F.silu(x)\n"
    assert "infinite recursion" in results(mine(source))["silu"].text


def test_a_check_restores_the_reference(mine):
    before = swap.origins()
    results(mine(WRONG))
    assert swap.origins() == before and not swap.user_pieces()


# --------------------------------------------------------------------------------------------------
# The program


def test_from_an_empty_folder_to_a_passed_step(mine, capsys):
    assert learn.main([]) == 0
    assert "[ ]  1 linear" in capsys.readouterr().out
    assert learn.main(["start", "silu"]) == 0
    assert "added to mine.py: silu" in capsys.readouterr().out
    assert learn.main(["check"]) == 1
    steps = len(lessons.COURSES["basics"])
    assert f"silu: not started\nbasics: 0 of {steps} steps passed" in capsys.readouterr().out
    mine(WRONG)
    assert learn.main(["check", "silu"]) == 1
    assert learn.main([]) == 0 and "[!]  5 silu" in capsys.readouterr().out
    for number in (1, 2, 3, 3):
        assert learn.main(["hint", "silu"]) == 0
        assert f"silu, hint {number} of 3" in capsys.readouterr().out
    assert (
        learn.main([]) == 0 and "next: uv run python -m llm_basics.learn hint silu" in capsys.readouterr().out
    )
    mine(RIGHT)
    assert learn.main([]) == 0
    shown = capsys.readouterr().out
    assert "changed since the last check" in shown and "learn check silu --mine mine.py" in shown
    assert learn.main(["check"]) == 0
    assert learn.main([]) == 0
    assert "[x]  5 silu" in capsys.readouterr().out
    assert learn.main(["next"]) == 0 and "start linear" in capsys.readouterr().out
    assert learn.main(["hint"]) == 0 and "linear, hint 1 of 3" in capsys.readouterr().out
    assert json.loads(Path("mine.progress.json").read_text())["hints"] == {"silu": 3, "linear": 1}


def test_hints_and_predictions_are_of_the_current_step(mine, capsys):
    """The first step in the file that is not passed, else the first of all."""
    mine(WRONG + "def gelu(x, approximate='none'):\n    return x\n")
    progress.Progress("mine.py").save()
    assert learn.main(["predict"]) == 0 and capsys.readouterr().out.startswith("silu: ")
    known = progress.Progress("mine.py")
    known.note("silu", "passed")
    known.save()
    assert learn.main(["hint"]) == 0 and capsys.readouterr().out.startswith("gelu, hint 1 of 3")
    assert learn.main(["predict", "--answer", str(lessons.load("gelu").predict.answer)]) == 0
    for name in lessons.ORDER:
        known.note(name, "passed")
    known.save()
    with pytest.raises(SystemExit):
        learn.main(["hint"])
    assert "all steps of mine.py passed; name a step, or train" in capsys.readouterr().err


def test_a_check_announces_itself_and_the_next_step(mine, capsys, monkeypatch):
    mine(RIGHT)
    announced = []

    def check(path, only):
        announced.append(capsys.readouterr().err)
        yield checks.Result("silu", "passed", "silu: passed")

    monkeypatch.setattr(checks, "check", check)
    assert learn.main(["check", "silu"]) == 0
    assert announced == ["checking mine.py: silu\n"]
    assert capsys.readouterr().out == f"silu: passed\nnext: {learn.PROGRAM} show linear\n"


def test_until_torch_is_needed_it_is_not_imported(tmp_path):
    code = "import sys; from llm_basics.learn import __main__ as m; m.main(['hint'])"
    code += "; assert 'torch' not in sys.modules"
    assert run("-c", code, cwd=tmp_path).returncode == 0


def test_watch_tells_what_it_waits_for(mine, capsys, monkeypatch):
    path = mine(WRONG)

    def saved(folder):
        assert "waiting for mine.py to be saved; Ctrl-C stops" in capsys.readouterr().out
        path.write_text("import torch\n" + RIGHT)
        yield {(1, str(Path("other.py").resolve()))}
        yield {(1, str(path.resolve()))}
        raise KeyboardInterrupt

    monkeypatch.setattr("watchfiles.watch", saved)
    assert learn.main(["check", "--watch"]) == 0
    assert capsys.readouterr().out.count("silu: passed") == 1


def test_text_is_wrapped_to_the_terminal(mine, capsys, monkeypatch):
    mine(WRONG)
    shown = []
    for columns in ("200", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        assert learn.main(["check"]) == 1
        for command in (["show", "silu"], ["hint", "silu"], ["predict", "silu"]):
            learn.main(command)
        Path("mine.progress.json").unlink()
        shown.append(capsys.readouterr().out)
    wide, narrow = shown
    assert narrow.split() == wide.split() and narrow != wide
    for text, limit in ((narrow, 60), (wide, console.NUMBERS)):
        assert max(len(line) for line in text.splitlines() if "uv run" not in line) <= limit


@pytest.mark.parametrize("name", lessons.ORDER)
def test_every_step_has_a_page_and_a_solution(name, capsys, mine):
    assert learn.main(["show", name]) == 0
    shown = capsys.readouterr().out
    assert lessons.load(name).title in shown and "uv run pytest tests/test_steps.py" in shown
    assert learn.main(["solution", name]) == 0
    assert all(piece in capsys.readouterr().out or piece for piece in lessons.load(name).pieces)


def test_a_prediction_is_graded(mine, capsys):
    right = lessons.load("softmax").predict.answer
    assert learn.main(["predict", "softmax"]) == 0
    assert learn.main(["predict", "softmax", "--answer", str(right % 3 + 1)]) == 1
    assert f"wrong: it is {right}" in capsys.readouterr().out
    assert learn.main(["predict", "softmax", "--answer", str(right)]) == 0
    # the first answer counts
    assert progress.Progress("mine.py").predicted == {"softmax": False}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "softmx"], "unknown step softmx; did you mean softmax?"),
        (["chek"], "unknown command chek; did you mean check?"),
        (["bogus"], "unknown command bogus; it must be one of list, show, start, check"),
        (["check", "--wach"], "unknown option --wach (command line); the closest is --watch"),
        (["check", "softmx"], "unknown step softmx; did you mean softmax?"),
        (["check"], "no file mine.py; create it: "),
        (["check", "rope", "--mine", "other.py"], "must define one of rope_tables"),
        (["predict", "softmax", "--answer", "9"], "--answer must be from 1 to"),
        (["mistakes", "checkpont"], "unknown step checkpont; did you mean checkpoint?"),
        (["dojo", "--answer", "9"], "--answer must be from 1 to 5"),
    ],
)
def test_usage_errors_are_one_line(mine, capsys, arguments, message):
    Path("other.py").write_text("def silu(x):\n    return x\n")
    with pytest.raises(SystemExit) as stop:
        learn.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_check_is_stale_after_a_change_of_the_piece_or_a_helper(mine):
    known = progress.Progress(mine("def wide(x):\n    return x\n" + RIGHT))
    known.note("silu", "passed")
    mine("def wide(x):\n    return x\n# a remark\ndef gelu(x):\n    return x\n" + RIGHT)
    assert known.is_current("silu")
    for changed in ("def wide(x):\n    return 2 * x\n" + RIGHT, "def wide(x):\n    return x\n" + WRONG):
        mine(changed)
        assert not known.is_current("silu")


def test_the_last_message_of_a_check_is_kept(mine, capsys):
    mine(WRONG)
    assert learn.main(["check"]) == 1
    kept = progress.Progress("mine.py").messages["silu"]
    assert "SIGMOID ALONE" in kept and kept.splitlines()[0] in capsys.readouterr().out
    # a file of an earlier version has none
    path = Path("mine.progress.json")
    stored = json.loads(path.read_text())
    del stored["messages"]
    path.write_text(json.dumps(stored))
    assert (
        progress.Progress("mine.py").messages == {} and progress.Progress("mine.py").steps == stored["steps"]
    )


def test_an_invalid_progress_file_raises(mine):
    Path("mine.progress.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match="mine.progress.json is not a valid progress file .* delete it"):
        progress.Progress("mine.py")


# --------------------------------------------------------------------------------------------------
# Logs and the dojo


def log(losses, grad_norm=1.0, **last):
    """The metrics of a run that logs every 20 steps."""
    steps = [1 + 20 * i for i in range(len(losses))]
    entries = [
        {"step": step, "train_loss": loss, "grad_norm": grad_norm}
        for step, loss in zip(steps, losses, strict=True)
    ]
    return [*entries, {"step": steps[-1], **last}]


@pytest.mark.parametrize(
    "metrics, message",
    [
        (log([33.0, 20.0, 5.0, 3.0]), "the first loss is 33.00; a uniform guess"),
        (log([1.0, 0.9, 0.8]), "the first loss is 1.00, below a uniform guess"),
        (log([5.5, 3.0, 2.0, 1.0], bits_per_byte=0.1, val_loss=0.2), "better than any compressor"),
        (log([5.55, 5.53, 5.52, 5.52, 5.51, 5.51], grad_norm=0.01), "gradient norm is 0.01"),
        (log([5.5, 5.6, 5.9, 6.0]), "and does not fall"),
        (log([5.5, 5.5, 5.5, 5.5]), "the loss never changes"),
        ([], "no training loss recorded"),
    ],
)
def test_signs_of_mistakes_are_found_in_metrics(metrics, message):
    assert message in " ".join(seen for seen, _ in log_checks.findings(metrics, vocab_size=256))


def test_good_metrics_have_no_signs():
    good = log([5.6, 5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.8, 1.8], bits_per_byte=2.5, val_loss=1.9)
    assert not list(log_checks.findings(good, vocab_size=256))


@pytest.mark.slow
def test_a_healthy_model_reaches_the_entropy_rate():
    evidence = dojo.healthy()
    rate = dojo.source()[1]
    assert rate - 0.06 < evidence.losses[-1] < rate + 0.15
    assert not evidence.sees_the_future and evidence.sees_the_past
    assert all(norm > 0 for norm in evidence.gradients.values())
    assert "log check" not in "\n".join(dojo.describe(evidence))


def test_the_dojo_hides_a_mistake_and_grades_answers(capsys):
    assert dojo.enter(seed=1, answer=None) == 0
    shown = capsys.readouterr().out
    assert "Which mistake is it?" in shown and len(re.findall(r"^  [1-5]  ", shown, re.M)) == 5
    statuses = [dojo.enter(seed=1, answer=answer) for answer in range(1, 6)]
    assert sorted(statuses) == [0, 1, 1, 1, 1]


# --------------------------------------------------------------------------------------------------
# User code in checks and in training


def run(*arguments, cwd):
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


TINY = (
    "--data text.txt --tokenizer bytes --fast off --train.steps 2 --train.batch_size 2 "
    "--model.d_model 16 --model.n_layers 1 --model.n_heads 2 --model.context_length 8"
).split()


def test_user_code_is_checked_trained_and_sampled(mine, tmp_path, capsys):
    def train(*arguments):
        with swap.restored():
            return job.main(parse.train_options(list(arguments)))

    (tmp_path / "text.txt").write_text("a little text to learn from\n" * 40)
    broken = "def silu(x):\n    raise RuntimeError('this is mine')\n"
    mine(broken)
    assert learn.main(["check"]) == 1 and "RuntimeError: this is mine" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="this is mine"):
        train("--mine", "mine.py", *TINY, "--run_dir", "first")
    mine(RIGHT)
    assert train("--mine", "mine.py", *TINY, "--run_dir", "run") == 0
    trained = capsys.readouterr().out
    assert re.search(r"pieces +silu from mine.py \(\w{12}\); reference code for the rest", trained)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["origins"]["functional.silu"].startswith("mine.py (")
    assert (tmp_path / "run" / "mine.py").read_text() == Path("mine.py").read_text()
    assert train("--resume", "run", "--train.steps", "3") == 0
    resumed = capsys.readouterr().out
    assert "pieces    silu from mine.py" in resumed and "bit for bit" not in resumed
    mine(RIGHT + "# other\n")
    assert train("--resume", "run", "--train.steps", "4") == 0
    assert "different: functional.silu was mine.py" in capsys.readouterr().out
    mine(broken)
    with pytest.raises(RuntimeError, match="this is mine"):
        samples.main(commands.GenerateConfig("run", mine="mine.py", device="cpu"))


def test_pytest_grades_user_pieces(mine, tmp_path):
    mine(WRONG)
    tests = [str(REPOSITORY / "tests" / name) for name in ("test_steps.py", "test_functional.py")]
    options = ["-q", "-p", "no:cacheprovider", "-k", "silu or gelu or softmax", "--report", "report.json"]
    graded = run("-m", "pytest", *tests, "--mine", "mine.py", *options, cwd=tmp_path)
    assert graded.returncode == 1
    assert "pieces: silu from mine.py" in graded.stdout or "silu: " in graded.stdout
    assert "Traceback" not in graded.stdout and "conftest.py" not in graded.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"]["silu"]["status"] == "failed" and report["steps"]["silu"]["mistake"]
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# mine.py: 0 of 1 steps passed") and "| silu | failed |" in page


FOREIGN = """
import torch
from torch.nn import functional as tF
def run_silu(in_features):
    return tF.silu(in_features)
def run_softmax(in_features, dim):
    return torch.softmax(in_features, -1)
def run_gelu(in_features, approximate="none"):
    while True:
        pass
"""


def test_foreign_adapters_are_graded_and_missing_ones_skipped(tmp_path):
    folder = tmp_path / "theirs" / "tests"
    folder.mkdir(parents=True)
    (folder / "adapters.py").write_text(FOREIGN)
    (tmp_path / "sitecustomize.py").write_text("")
    options = ["-q", "-rs", "-p", "no:cacheprovider", "--report=r.json"]
    steps = [str(REPOSITORY / "tests" / "test_steps.py"), "-k", "silu or softmax or rope"]
    graded = run("-m", "pytest", *steps, *options, f"--adapters={folder / 'adapters.py'}", cwd=tmp_path)
    report = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert report["silu"]["status"] == "passed" and report["silu"]["time_relative_to_reference"] > 0
    assert report["silu"]["ready_made"] == ["tests/adapters.py:5 uses torch.nn.functional.silu"]
    assert report["softmax"]["mistake"] == "dim ignored" and report["softmax"]["missing"] == []
    assert "softmax: along the middle of three axes (9 of 11 probes passed)" in graded.stdout
    assert "run_rope: not in the adapters file" in graded.stdout


def test_a_second_race_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "reference").mkdir()
    with pytest.raises(ValueError, match="--out must have no race in it, got .*reference"):
        race.run_both("mine.py", "text.txt", 2, tmp_path)


def test_a_race_needs_no_second_stage(tmp_path, monkeypatch):
    commands = []

    def fail(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(race.subprocess, "run", fail)
    assert race.run_both("mine.py", "text.txt", 2, tmp_path) == 1
    options = parse.train_options(commands[0][3:])
    assert not options.model.qk_norm and options.train.steps == 2 and options.mine == "mine.py"


def test_both_curves_are_plotted(tmp_path):
    for name, offset in (("yours", 0.0), ("reference", 0.1)):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "train_loss": 5 - i / 10 + offset, "val_loss": 5.0 + offset} for i in range(5)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert race.final_loss(tmp_path / "reference") == 5.1
    folders = {name: tmp_path / name for name in ("yours", "reference")}
    assert race.figures.plot_runs(folders, tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_global_state_is_restored_between_pieces(mine):
    spoiling = "def gelu(x, approximate='none'):\n    torch.set_default_dtype(torch.float64)\n"
    spoiling += "    torch.set_grad_enabled(False)\n    return x\n"
    first = results(mine(spoiling + RIGHT))
    assert first["gelu"].status == "failed" and first["silu"].status == "passed"
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert results(mine(RIGHT))["silu"].status == "passed"


@pytest.mark.parametrize("waiting", ["time.sleep(60)", "threading.Event().wait(60)", "input()"])
def test_waiting_times_out(mine, monkeypatch, waiting):
    monkeypatch.setattr(probes, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr("builtins.input", lambda: time.sleep(60))
    source = f"import time, threading\ndef silu(x):\n    {waiting}\n"
    started = time.monotonic()
    assert "stopped: not finished after" in results(mine(source))["silu"].text
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "body, message",
    [
        ("x * torch.sigmoid(x)", "the result must be a tensor, got NoneType"),
        ("raise SystemExit(0)", "it raised SystemExit"),
        ("return torch.nn.Module()(x)", "it raised NotImplementedError"),
    ],
)
def test_errors_are_reported(mine, body, message):
    assert message in results(mine(f"def silu(x):\n    {body}\n"))["silu"].text


def test_a_check_of_one_step_reports_failing_dependencies(mine):
    source = "def linear(x, weight, bias=None):\n    return x @ weight\n"
    source += "def swiglu(x, w1, w2, w3):\n    s = linear(x, w1)\n"
    source += "    return linear(s * torch.sigmoid(s) * linear(x, w3), w2)\n"
    found = results(mine(source), "swiglu")["swiglu"]
    assert found.text.endswith("depends on linear, which does not pass; fix that first")


def test_two_mistakes_are_not_named_as_a_third(mine):
    source = (
        "import numpy as np\n"
        "def get_batch(tokens, batch_size, context_length, device='cpu', rng=None):\n"
        "    rng = rng or np.random.default_rng()\n"
        "    starts = rng.integers(0, len(tokens) - context_length - 1, size=batch_size)\n"
        "    batch = torch.from_numpy(np.stack([tokens[s : s + context_length + 1] for s in starts]))\n"
        "    return batch[:, :-1], batch[:, 1:]\n"
    )
    assert "TARGETS SHIFTED" not in results(mine(source))["batches"].text


def test_a_context_manager_annotated_as_its_generator_is_not_checked():
    jaxtyping.config.update("jaxtyping_disable", False)
    module = types.ModuleType("annotated")

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        yield

    block.__module__ = module.__name__
    module.block = block
    checks.check_shapes(module)
    with module.block():
        pass
