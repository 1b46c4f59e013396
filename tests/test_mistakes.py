"""The catalogue of mistakes. Alone: `uv run pytest tests/test_mistakes.py`.

Every mistake is plugged in, must fail the step in which it is made, and must be identified by name; a fifth
of them by default, all with `-m "slow or not slow"` and by `uv run python -m llm_basics.learn mistakes`.
"""

import re
from pathlib import Path

import pytest
import torch
import trials
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.learn import judge, messages, probes, sockets

# the slowest probes; the last to be run, where the others do not name the mistake
LONG_PROBES = {
    "how often each token is drawn",
    "how often at a temperature of 4",
    "the likeliest token after a prompt of 4",
    "the generator determines the samples",
    "twelve tokens, past the context",
    "a generator continues where the last text ended",
    "a transformer learns a repetitive text",
    "it can memorize one batch",
}

# named only by thousands of draws, two to five seconds each
LONG_MISTAKES = {
    "sampling: always the likeliest",
    "sampling: generator ignored",
    "sampling: generator seeded for each text",
    "sampling: top p not passed on",
    "sampling: temperature not passed on",
}

MISTAKES = [(name, mistake) for name in judge.STEPS for mistake in judge.load(name).mistakes]
each_step = pytest.mark.parametrize("name", judge.STEPS)


def test_the_long_probes_exist():
    assert {probe.about for name in judge.STEPS for probe in judge.load(name).probes} >= LONG_PROBES


@each_step
def test_the_reference_passes(name):
    verdict = judge.judge(judge.load(name), sockets.own())
    assert verdict.status == "passed" and verdict.n_passed == verdict.n_probes, verdict


@pytest.mark.parametrize(
    "name, mistake",
    [
        pytest.param(n, m, marks=pytest.mark.slow if i % 5 or f"{n}: {m.name}" in LONG_MISTAKES else ())
        for i, (n, m) in enumerate(MISTAKES)
    ],
    ids=[f"{n}: {m.name}" for n, m in MISTAKES],
)
def test_a_mistake_is_caught_and_named(name, mistake: probes.Mistake):
    step, right = judge.load(name), mistake.same_as or mistake.name
    # more probes only rule out more mistakes: one that is named right by some of them is by all
    seen, verdict = {}, judge.Verdict(name, "passed")
    for i in sorted(range(len(step.probes)), key=lambda i: step.probes[i].about in LONG_PROBES):
        seen[i] = judge.observation_of(name, mistake.name, i)
        is_caught = probes.differing(step.probes[i], seen[i], judge.expected(name, i))
        if is_caught and not trials.is_full:
            verdict = judge.conclude(step, seen)
            if verdict.sure and verdict.mistake and verdict.mistake.name == right:
                break
    else:
        verdict = judge.conclude(step, seen)
    assert verdict.status == "failed"
    assert verdict.sure and verdict.mistake is not None
    assert verdict.mistake.name == right
    lines = messages.message(verdict, "next hint").splitlines()
    assert len(lines) <= messages.MAX_LINES and max(map(len, lines)) <= messages.LINE + 2
    assert "Traceback" not in " ".join(lines)


@each_step
def test_explanations_have_a_source_and_a_length(name):
    step = judge.load(name)
    assert step.name == name
    assert len({mistake.name for mistake in step.mistakes}) == len(step.mistakes)
    for mistake in step.mistakes:
        assert mistake.source
        assert 60 <= len(mistake.explanation) <= 330, f"{mistake.name}: {len(mistake.explanation)}"
    for probe in step.probes:
        assert len(probe.about) <= 80


# --------------------------------------------------------------------------------------------------
# Correct implementations pass


class _Linear(nn.Linear):
    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        std = (2 / (in_features + out_features)) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)


def _attention(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    mixed = tF.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal)
    # a fully masked row is 0 in torch too, but its gradient may be NaN
    return mixed if mask is None else torch.where(mask.any(-1, keepdim=True), mixed, 0.0)


def _cross_entropy(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    flat = wide.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    total = tF.cross_entropy(*flat, ignore_index=ignore_index, reduction="sum")
    return (total / (targets != ignore_index).sum().clamp(min=1)).to(logits.dtype)


# torch's functions and classes, with the parameters of the pieces
OF_TORCH = {
    "linear": {"functional.linear": tF.linear, "layers.Linear": _Linear},
    "embedding": {"functional.embedding": lambda token_ids, weight: tF.embedding(token_ids, weight)},
    "softmax": {
        "functional.softmax": lambda x, dim=-1: tF.softmax(x, dim),
        "functional.log_softmax": lambda x, dim=-1: tF.log_softmax(x, dim),
    },
    "cross_entropy": {"functional.cross_entropy": _cross_entropy},
    "silu": {"functional.silu": tF.silu},
    "gelu": {"functional.gelu": lambda x, approximate="none": tF.gelu(x, approximate=approximate)},
    "relu2": {"functional.relu2": lambda x: tF.relu(x).square()},
    "swiglu": {
        "functional.swiglu": lambda x, w1, w2, w3: tF.linear(tF.silu(tF.linear(x, w1)) * tF.linear(x, w3), w2)
    },
    "rms_norm": {
        "functional.rms_norm": lambda x, weight, eps=1e-5: tF.rms_norm(x, weight.shape, weight, eps)
    },
    "layer_norm": {
        "functional.layer_norm": lambda x, weight, bias=None, eps=1e-5: tF.layer_norm(
            x, weight.shape, weight, bias, eps
        )
    },
    "attention": {"functional.scaled_dot_product_attention": _attention},
    "adamw": {"optim.AdamW": torch.optim.AdamW},
    "clipping": {
        "optim.clip_grad_norm_": lambda parameters, max_norm, error_if_nonfinite=False: (
            nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=error_if_nonfinite)
        )
    },
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_torch_passes(name):
    with swap.replaced(OF_TORCH[name]):
        verdict = judge.judge(judge.load(name), sockets.own())
    assert verdict.status == "passed" and verdict.mistake is None, verdict


def test_the_catalogue_is_complete():
    assert len(MISTAKES) >= 150
    assert all(any(m.source for m in judge.load(name).mistakes) for name in judge.STEPS)


def test_the_documentation_has_the_table():
    root = Path(__file__).parent.parent
    page = (root / "docs" / "learning.md").read_text(encoding="utf-8")
    counts = {name: len(judge.load(name).mistakes) for name in judge.STEPS}
    for name, count in [*counts.items(), ("all", sum(counts.values()))]:
        assert f"| {name} | {count} | {count} | {count} |" in page
    assert "`checkpoint`, which has tests but no lesson" in page
    said = re.search(r"More than ([\d,]+) mistakes", (root / "README.md").read_text(encoding="utf-8"))
    assert said is not None and int(said[1].replace(",", "")) < sum(counts.values())
