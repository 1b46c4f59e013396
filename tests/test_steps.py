"""The steps of the course, each with one verdict: passed, or the mistake that it makes.

uv run pytest tests/test_steps.py --mine mine.py                     your pieces
uv run pytest tests/test_steps.py --adapters=PATH/tests/adapters.py  another implementation
"""

import dataclasses
import functools

import pytest
import torch

from llm_basics.learn import judge, messages, probes


@pytest.mark.parametrize("name", judge.STEPS)
def test_step(name, judged, next_step):
    verdict = judged(name)
    if verdict.status == "missing":
        pytest.skip(f"{', '.join(verdict.missing) or 'not public, and'}: not in the adapters file")
    if verdict.status == "advice":
        pytest.skip(f"not public; {len(verdict.advice)} probes failed")
    if verdict.status != "passed":
        text = messages.message(verdict, next_step(name))
        ground = "".join(getattr(finding, "ground", "") for finding in verdict.failures[:1])
        pytest.fail(f"{text}\n  contract: {ground}" if ground else text, pytrace=False)


def precise(probe: probes.Probe) -> probes.Probe | None:
    """The same comparison of tensors in float64; None for half precision, or without tensors."""
    floats = [tensor for tensor in probe.tensors.values() if tensor.is_floating_point()]
    if not floats or any(tensor.dtype != torch.float32 for tensor in floats):
        return None
    tensors = {k: t.double() if t.is_floating_point() else t for k, t in probe.tensors.items()}
    # the tables of RoPE may be float32
    atol = 1e-7 if probe.atol <= 1e-5 else min(probe.atol, 1e-4)
    return dataclasses.replace(probe, tensors=tensors, rtol=1e-5, atol=atol)


PRECISE = [
    pytest.param(probe, id=f"{name}: {probe.about}")
    for name in judge.STEPS
    for probe in map(precise, judge.load(name).probes)
    if probe is not None
]


@pytest.mark.parametrize("probe", PRECISE)
def test_oracle_in_float64(probe, adapters):
    leaves = probe.tensors if probe.gradients else {}
    expected = probes.observe_tensors(probe.right, probe.tensors, leaves)
    found = probes.observe_tensors(functools.partial(probe.function, adapters), probe.tensors, leaves)
    assert not list(messages.differences(probe, expected, found))
