"""Mistakes with a parameter, other exceptions. Alone: `uv run pytest tests/test_families.py`.

Nothing tried here is in the catalogue as it stands: each must be named all the same, with its value.
"""

import pytest
import test_pairs

from llm_basics import swap
from llm_basics.learn import grids, judge, messages, probes, sockets

# of a step and a family: values that its grid does not have, as they must be stated
VALUES = {
    ("rms_norm", "epsilon fixed at a number"): ["3e-4", "0.07", "1.25e-6"],
    ("rms_norm", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("layer_norm", "epsilon fixed at a number"): ["3e-4", "0.07", "1.25e-6"],
    ("layer_norm", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("attention", "exponent of the scale"): ["0.3", "0.45", "0.9"],
    ("attention", "scale fixed at a number"): ["0.3", "0.07", "1.5"],
    ("attention", "masked with a number"): ["-3", "-7.5", "-0.3"],
    ("attention", "masked with a number but rows of zeros"): ["-3", "-7.5", "-0.3"],
    ("attention", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("rope", "theta fixed at a number"): ["2000", "50000", "640"],
    ("rope", "positions offset by a number"): ["2", "-1", "5"],
    ("rope", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("adamw", "epsilon fixed at a number"): ["3e-4", "0.07", "0.5"],
    ("adamw", "weight decay fixed at a number"): ["0.05", "0.3", "7e-3"],
    ("schedule", "floor fixed at a number"): ["0.4", "0.07", "1.5e-4"],
    ("schedule", "warm up of a fixed length"): ["2", "7", "3"],
    ("schedule", "steps offset by a number"): ["2", "-1", "-3"],
    ("schedule", "factor on the output"): ["0.7", "1.5", "0.9"],
    ("cross_entropy", "factor on the output"): ["1.3", "0.7", "0.9"],
    ("silu", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("softmax", "always along another axis"): ["axis -2", "axis 2", "axes (0, 1)"],
    ("softmax", "log softmax along another axis"): ["axis 1", "axis -3", "axes (-2, -1)"],
    ("rms_norm", "mean over another axis"): ["axis 1", "axis -2", "axes (0, 1)"],
    ("layer_norm", "mean and variance over another axis"): ["axis -2", "axis 1", "axes (-3, -2)"],
    ("layer_norm", "variance over another axis"): ["axis 0", "axis -2", "axes (-2, -1)"],
    ("layer_norm", "mean over another axis"): ["axis 1", "axis -3", "axes (0, 1)"],
    ("cross_entropy", "normalized over another axis"): ["axis -2", "axis -3", "axes (-2, -1)"],
    ("rope", "tables in another dtype"): ["float16", "bfloat16", "float8_e5m2"],
    ("rope", "angles in another dtype"): ["bfloat16", "float16", "float8_e4m3fn"],
    ("rope", "all of rope in another dtype"): ["bfloat16", "float16", "float8_e5m2"],
    ("linear", "weight in another dtype"): ["float16", "bfloat16", "float8_e4m3fn"],
    ("embedding", "weight in another dtype"): ["float16", "bfloat16", "float8_e4m3fn"],
    ("clipping", "parameters left out"): [
        "the last parameter",
        "every second parameter",
        "parameters with fewer than two dimensions",
    ],
    ("clipping", "parameters not counted"): [
        "the first parameter",
        "the second parameter",
        "all parameters but the first",
    ],
    ("clipping", "parameters not scaled"): [
        "all parameters but the last",
        "the last parameter",
        "parameters with two or more dimensions",
    ],
    ("adamw", "groups not updated"): [
        "the second parameter group",
        "the last parameter group",
        "all parameter groups but the last",
    ],
    ("adamw", "groups that do not decay"): [
        "all parameter groups but the first",
        "the last parameter group",
        "the second parameter group",
    ],
    ("adamw", "settings of another group"): ["param_groups[-1]", "param_groups[1]", "param_groups[2]"],
    ("adamw", "parameters not updated"): [
        "the last parameter",
        "the second parameter",
        "parameters with fewer than two dimensions",
    ],
    ("transformer", "weights in another dtype"): ["float16", "float8_e4m3fn", "float8_e5m2"],
}
CASES = [(*key, value) for key, values in VALUES.items() for value in values]
# the first value of every second family by default
BY_DEFAULT = [(*key, values[0]) for key, values in list(VALUES.items())[::2]]
MARKED = [
    pytest.param(*case, id=" ".join(case), marks=[] if case in BY_DEFAULT else pytest.mark.slow)
    for case in CASES
]

# steps whose mistakes run in a second or two
QUICK = ("schedule", "multi_head")


def family_of(step: str, name: str) -> probes.Family:
    return next(family for family in judge.load(step).families if family.name == name)


def verdict_on(step: str, pieces: dict) -> judge.Verdict:
    with swap.replaced(pieces):
        return judge.judge(judge.load(step), sockets.own())


@pytest.mark.parametrize("step, name, value", MARKED)
def test_a_mistake_is_named_with_its_number(step, name, value):
    family = family_of(step, name)
    exact = next((each for each in family.values if grids.short(each) == value), None)
    verdict = verdict_on(step, {family.piece: family.make(float(value) if exact is None else exact)})
    assert verdict.status == "failed" and verdict.mistake is not None
    assert verdict.sure and verdict.mistake.name == name, verdict.mistake
    assert f" {value}" in verdict.mistake.explanation
    lines = messages.message(verdict, "next hint").splitlines()
    assert len(lines) <= messages.MAX_LINES and max(map(len, lines)) <= messages.LINE + 2


def test_a_number_that_the_probes_do_not_determine_is_not_stated():
    family = family_of("adamw", "epsilon fixed at a number")
    verdict = verdict_on("adamw", {family.piece: family.make(1.5e-6)})
    assert verdict.sure and verdict.mistake is not None
    assert verdict.mistake.explanation.startswith("Your epsilon is a fixed number")


# of a step: a piece, an edit of its source, and the family and the value that it must be named with
EDITED = [
    ("softmax", "functional.softmax", "scores = to", "dim = -2; scores = to", "axis -2"),
    ("softmax", "functional.log_softmax", "(to_float32(x), dim)", "(to_float32(x), 1)", "axis 1"),
    ("rms_norm", "functional.rms_norm", "mean(-1", "mean(-2", "axis -2"),
    ("layer_norm", "functional.layer_norm", "mean(-1", "mean(1", "axis 1"),
    (
        *("cross_entropy", "functional.cross_entropy", "(log_sum - shifted.gather(-1, safe_targets))"),
        *("-wide.log_softmax(-2).gather(-1, safe_targets)", "axis -2"),
    ),
    ("rope", "functional.rope_tables", "angles.cos()", "(angles := angles.half().double()).cos()", "float16"),
    ("rope", "functional.rope_tables", ".float()", ".bfloat16().float()", "bfloat16"),
    ("linear", "functional.linear", "weight.T", "weight.half().to(weight.dtype).T", "float16"),
    (
        *(
            "clipping",
            "optim.clip_grad_norm_",
            "for gradient in gradients:",
            "for gradient in gradients[1:]:",
        ),
        "the first parameter",
    ),
    (
        *("clipping", "optim.clip_grad_norm_", "for p in parameters if", "for p in list(parameters)[:-1] if"),
        "the last parameter",
    ),
    (
        *("adamw", "optim.AdamW", "in self.param_groups:", "in self.param_groups[1:]:"),
        "the first parameter group",
    ),
    (
        *("adamw", "optim.AdamW", "for parameter in group", "for parameter in group['params'][:-1] or group"),
        "",
    ),
    (
        *("adamw", "optim.AdamW", 'group["weight_decay"])', 'self.param_groups[-1]["weight_decay"])'),
        "",
    ),
    ("clipping", "optim.clip_grad_norm_", "for gradient in gradients:", "for gradient in gradients[2:]:", ""),
    ("rms_norm", "functional.rms_norm", "mean(-1", "amax(-1", ""),
]


@pytest.mark.parametrize("step, piece, old, new, value", EDITED, ids=[f"{e[1]} {e[3]}" for e in EDITED])
def test_edits_of_the_reference_are_named_with_their_value(step, piece, old, new, value):
    verdict = verdict_on(step, test_pairs.edited({"piece": piece, "old": old, "new": new}))
    assert verdict.status == "failed"
    if value:
        assert verdict.sure and verdict.mistake is not None
        assert f" {value}" in verdict.mistake.explanation
    else:
        names = {family.name for family in judge.load(step).families}
        assert verdict.mistake is None or verdict.mistake.name not in names


def test_an_axis_that_the_probes_do_not_determine_is_not_stated():
    family, step = family_of("softmax", "always along another axis"), judge.load("softmax")
    with swap.replaced({family.piece: family.make("axes (0, 1)")}):
        seen = {i: probes.observe(probe, sockets.own()) for i, probe in enumerate(step.probes)}
    # axes (-3, -2) are the same where there are three
    of_three_axes = {i: each for i, each in seen.items() if step.probes[i].about.endswith("three axes")}
    for some, stated in ((seen, "axes (0, 1),"), (of_three_axes, "another axis,")):
        verdict = judge.conclude(step, some)
        assert verdict.sure and verdict.mistake is not None and verdict.mistake.name == family.name
        assert f"always taken along {stated}" in verdict.mistake.explanation


def test_an_error_of_another_class_is_the_same_mistake():
    step = judge.load("schedule")
    made = next(m for m in step.mistakes if m.name == "division by no warm up")

    def wrong(*args, error=ValueError):
        try:
            return made.wrong(*args)
        except ZeroDivisionError:
            raise error("no warmup") from None

    verdict = verdict_on("schedule", {made.piece: wrong})
    assert verdict.sure and verdict.mistake is not None and verdict.mistake.name == made.name
    verdict = verdict_on("schedule", {made.piece: lambda *args: wrong(*args, error=NameError)})
    assert verdict.status == "failed" and verdict.mistake is None


OTHER_ERRORS = ["AssertionError", "TypeError", "IndexError"]


@pytest.mark.parametrize(
    "error",
    ["EinopsError", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHER_ERRORS)],
)
@pytest.mark.parametrize(
    "name",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in judge.STEPS],
)
def test_mistakes_that_raise_are_named_with_any_class_of_error(name, error):
    step = judge.load(name)
    for mistake in step.mistakes:
        seen = {i: judge.observation_of(name, mistake.name, i) for i in range(len(step.probes))}
        if not any("error" in each for each in seen.values()):
            continue
        changed = {
            i: each | {"error": f"{error}: {each['error']}"} if "error" in each else each
            for i, each in seen.items()
        }
        verdict = judge.conclude(step, changed)
        assert verdict.status == "failed"
        right = mistake.same_as or mistake.name
        assert (verdict.mistake.name if verdict.mistake and verdict.sure else right) == right, mistake.name
        if name in QUICK:
            assert verdict.sure and verdict.mistake is not None, mistake.name


def test_explanations_of_families_have_their_number_once_at_most():
    for step in judge.STEPS:
        for family in judge.load(step).families:
            # the size of a tile is found, and not stated
            assert family.explanation.count("{value}") <= 1
            assert 60 <= len(family.explanation) <= 330, family.name
