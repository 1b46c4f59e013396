"""Two mistakes of one step at once. Alone: `uv run pytest tests/test_pairs.py`.

Each pair is an edited copy of the reference with both in it: `fixtures/edits.yaml` has the edits. None may be
named wrongly; most must be named as a pair.
"""

import inspect
import textwrap
from pathlib import Path

import pytest
import yaml

from llm_basics import swap
from llm_basics.learn import judge, messages, sockets

EDITS = yaml.safe_load((Path(__file__).parent / "fixtures" / "edits.yaml").read_text(encoding="utf-8"))

# of a step: pairs of mistakes that do not hide each other, the quickest first
PAIRS = [
    ("rms_norm", "gain forgotten", "sum instead of mean"),
    ("softmax", "maximum not subtracted", "log softmax left in float32"),
    ("schedule", "warm up one step ahead", "pi forgotten"),
    ("schedule", "half forgotten", "cosine upward"),
    ("rms_norm", "gain forgotten", "mean over the sequence too"),
    ("rms_norm", "gain forgotten", "no epsilon"),
    ("rms_norm", "gain forgotten", "epsilon fixed"),
    ("rms_norm", "gain forgotten", "result left in float32"),
    ("rms_norm", "one added to the gain", "sum instead of mean"),
    ("rms_norm", "one added to the gain", "mean over the sequence too"),
    ("rms_norm", "one added to the gain", "no epsilon"),
    ("rms_norm", "one added to the gain", "epsilon fixed"),
    ("rms_norm", "one added to the gain", "result left in float32"),
    ("rms_norm", "sum instead of mean", "result left in float32"),
    ("rms_norm", "no epsilon", "result left in float32"),
    ("layer_norm", "variance divided by one less", "bias forgotten"),
    ("layer_norm", "variance divided by one less", "mean not subtracted"),
    ("layer_norm", "gain forgotten", "result left in float32"),
    ("layer_norm", "bias forgotten", "epsilon fixed"),
    ("schedule", "warm up one step ahead", "floor ignored"),
    ("schedule", "warm up one step ahead", "half forgotten"),
    ("schedule", "warm up one step ahead", "cosine upward"),
    ("schedule", "floor ignored", "pi forgotten"),
    ("schedule", "pi forgotten", "warm up to the floor only"),
    ("schedule", "cosine upward", "progress divided by the whole length"),
    ("softmax", "sign of the logarithm", "log softmax left in float32"),
    ("softmax", "dim ignored", "sign of the logarithm"),
    ("softmax", "small constant in the denominator", "maximum not subtracted"),
    ("cross_entropy", "sum instead of mean", "sign forgotten"),
    ("cross_entropy", "sum instead of mean", "computed in half precision"),
    ("cross_entropy", "sum instead of mean", "weight detached"),
    ("cross_entropy", "ignored targets counted in the mean", "weight detached"),
    ("attention", "no scale", "softmax over queries"),
    ("attention", "mask inverted", "never causal"),
    ("attention", "no scale", "weights detached"),
    ("attention", "scale without root", "never causal"),
    ("rope", "theta fixed at 10000", "rotated the other way"),
    ("rope", "positions from 1", "result concatenated"),
    ("swiglu", "gate added", "axes of size 1 removed"),
    ("gelu", "half forgotten", "result left in float32"),
]
# by default; shares of all that are named as a pair, and with one of the two at least
FEW, LEAST_PAIRS, LEAST_NAMED = 4, 0.75, 0.85


def edited(*edits):
    """The pieces with these edits in their sources; pieces of one module call each other."""
    sources, namespaces = {}, {}
    for edit in edits:
        right = inspect.unwrap(swap.reference(edit["piece"]))
        source = sources.get(edit["piece"]) or textwrap.dedent(inspect.getsource(right))
        assert edit["old"] in source, edit
        sources[edit["piece"]] = source.replace(edit["old"], edit["new"])
        namespaces.setdefault(right.__module__, dict(vars(inspect.getmodule(right))))
    for piece, source in sources.items():
        exec(source, namespaces[inspect.unwrap(swap.reference(piece)).__module__])
    return {
        piece: namespaces[inspect.unwrap(swap.reference(piece)).__module__][piece.split(".")[1]]
        for piece in sources
    }


def verdict_on(step, *names):
    with swap.replaced(edited(*(EDITS[step][name] for name in names))):
        return judge.judge(judge.load(step), sockets.own())


def named(verdict):
    return {each.name for each in (verdict.mistake, verdict.also) if each is not None}


def test_a_pair_is_named_with_the_fault_of_each():
    verdict = verdict_on("rms_norm", "gain forgotten", "sum instead of mean")
    assert verdict.sure and named(verdict) == {"gain forgotten", "sum instead of mean"}
    text = messages.message(verdict, "next hint")
    assert "mistake: SUM INSTEAD OF MEAN" in text or "and also: SUM INSTEAD OF MEAN" in text
    assert "The result is not multiplied by the learned weight." in text
    assert len(text.splitlines()) <= messages.MAX_LINES


@pytest.mark.parametrize("is_few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_pairs_of_mistakes_are_never_named_wrongly(is_few):
    tried = PAIRS[:FEW] if is_few else PAIRS
    n_pairs = n_any = 0
    for step, *names in tried:
        verdict = verdict_on(step, *names)
        assert verdict.status == "failed" and named(verdict) <= set(names), (step, names, named(verdict))
        assert not verdict.sure or named(verdict) == set(names), (step, names, named(verdict))
        n_pairs += verdict.sure
        n_any += bool(named(verdict))
    print(f"{len(tried)} pairs: {n_pairs} named as a pair, one of the two or both in {n_any}")
    assert n_pairs >= (0.75 if is_few else LEAST_PAIRS) * len(tried)
    assert n_any >= (0.75 if is_few else LEAST_NAMED) * len(tried)


def test_what_one_mistake_does_not_explain_is_left():
    step = judge.load("rms_norm")
    seen = {i: judge.observation_of("rms_norm", "gain forgotten", i) for i in range(len(step.probes))}
    at = next(i for i, probe in enumerate(step.probes) if probe.about == "rows of very different scale")
    seen[at] = seen[at] | {"output": 3 * seen[at]["output"]}
    verdict = judge.conclude(step, seen)
    assert named(verdict) == {"gain forgotten"} and not verdict.sure
    assert [finding.probe for finding in verdict.left] == ["rows of very different scale"]
    lines = messages.message(verdict, "next hint").splitlines()
    assert "  mistake: GAIN FORGOTTEN" in lines and len(lines) <= messages.MAX_LINES
    assert any(line.startswith("  and also, rows of very different scale: at batch 0") for line in lines)


def test_a_mistake_that_explains_less_than_half_is_not_named():
    step = judge.load("rms_norm")
    seen = {i: judge.observation_of("rms_norm", "gain forgotten", i) for i in range(len(step.probes))}
    for i in list(seen)[1:]:
        seen[i] = {facet: value + 3 if facet == "output" else value for facet, value in seen[i].items()}
    verdict = judge.conclude(step, seen)
    assert verdict.status == "failed" and verdict.mistake is None
