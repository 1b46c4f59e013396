"""The steps of learning, each judged as a whole: passed, or which mistake was made.

uv run pytest tests/test_steps.py --mine mine.py                     your own pieces
uv run pytest tests/test_steps.py --adapters=PATH/tests/adapters.py  somebody's
"""

import dataclasses
import functools

import pytest
import torch

from llm_basics.learn import judge, messages, probes


@pytest.mark.parametrize("name", judge.STEPS)
def test_step(name, judged, how_to_go_on):
    verdict = judged(name)
    if verdict.status == "missing":
        pytest.skip(f"{', '.join(verdict.missing)}: not in the adapters file")
    if verdict.status != "passed":
        pytest.fail(messages.message(verdict, how_to_go_on(name)), pytrace=False)


def precise(probe: probes.Probe) -> probes.Probe | None:
    """The same comparison of tensors in float64; None where it is one of half precision, or of no tensors."""
    floats = [tensor for tensor in probe.tensors.values() if tensor.is_floating_point()]
    if not floats or any(tensor.dtype != torch.float32 for tensor in floats):
        return None
    tensors = {k: t.double() if t.is_floating_point() else t for k, t in probe.tensors.items()}
    # where RoPE turns, its tables of angles may be float32
    atol = 1e-7 if probe.atol <= 1e-5 else min(probe.atol, 1e-4)
    return dataclasses.replace(probe, tensors=tensors, rtol=1e-5, atol=atol)


PRECISE = [
    pytest.param(probe, id=f"{name}: {probe.about}")
    for name in judge.STEPS
    for probe in map(precise, judge.load(name).probes)
    if probe is not None
]


@pytest.mark.parametrize("probe", PRECISE)
@pytest.mark.beyond
def test_oracle_in_float64(probe, adapters):
    wanted = probe.tensors if probe.gradients else {}
    expected = probes.observe_tensors(probe.right, probe.tensors, wanted)
    found = probes.observe_tensors(functools.partial(probe.function, adapters), probe.tensors, wanted)
    assert not list(messages.differences(probe, expected, found))
