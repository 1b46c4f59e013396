"""Blocks that are recomputed in the backward pass: same losses, less memory.

Run alone: uv run pytest tests/test_activation_checkpointing.py
"""

import dataclasses
import inspect
import shutil

import pytest
import torch

from llm_basics import swap
from llm_basics.core import config, layers, model, trainer
from llm_basics.core import functional as F
from llm_basics.runs import run_dir
from llm_basics.training import activation_checkpointing, job, memory, setup

SHAPE = config.ModelConfig(vocab_size=257, context_length=16, d_model=32, n_layers=2, n_heads=2)


@pytest.fixture
def options(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    train = config.TrainConfig(
        steps=4,
        min_lr=config.TrainConfig.lr,
        warmup_steps=1,
        batch_size=2,
        eval_batches=1,
        sample_tokens=2,
        device="cpu",
        log_every=1,
    )
    with swap.restored():
        yield config.Config(
            data=str(tmp_path / "text.txt"),
            tokenizer="bytes",
            fast="off",
            data_dir=str(tmp_path / "data"),
            model=SHAPE,
            train=train,
        )


def losses(options, folder, mine=None, **settings):
    """The training losses of a run."""
    train = dataclasses.replace(options.train, **settings)
    assert job.main(dataclasses.replace(options, train=train, run_dir=str(folder), mine=mine)) == 0
    return [m["train_loss"] for m in run_dir.read_metrics(folder) if m.get("train_loss") is not None]


@pytest.mark.parametrize(("dropout", "accumulation"), [(0.0, 1), (0.2, 3)])
def test_losses_are_the_same_to_the_last_bit(options, tmp_path, dropout, accumulation, capsys):
    options = dataclasses.replace(options, model=dataclasses.replace(SHAPE, dropout=dropout))
    found, is_printed = [], []
    for on in (False, True):
        settings = {"activation_checkpointing": on, "grad_accumulation_steps": accumulation}
        found.append(losses(options, tmp_path / str(on), **settings))
        is_printed.append(f"blocks    {setup.RECOMPUTED}\n" in capsys.readouterr().out)
    assert len(found[0]) == 4 and found[0] == found[1]
    assert is_printed == [False, True]


def test_blocks_run_twice_in_training_and_once_without(options, monkeypatch, tmp_path):
    calls = []
    silu = F.silu
    monkeypatch.setattr(F, "silu", lambda x: calls.append(torch.is_grad_enabled()) or silu(x))
    network = model.TransformerLM(SHAPE)
    activation_checkpointing.apply(network)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    trainer.batch_loss(network, tokens, tokens, 0.0).backward()
    assert calls == 4 * [True]
    with torch.no_grad():
        network(tokens)
    assert calls == 4 * [True] + 2 * [False]
    assert not set(network.state_dict()) ^ set(model.TransformerLM(SHAPE).state_dict())


def test_a_block_of_the_user_is_recomputed_too(options, tmp_path):
    mine = tmp_path / "mine.py"
    names = "from torch import nn\nfrom llm_basics.core import layers\n"
    names += "from llm_basics.core.model import make_ffn, make_norm\n"
    source = inspect.getsource(inspect.unwrap(model.TransformerBlock))
    mine.write_text(
        f"{names}import torch\nfrom torch import Tensor\nfrom jaxtyping import Float, Int\n"
        f"from llm_basics.core import config\n\n\n{source}"
    )
    found = [
        losses(options, tmp_path / str(on), str(mine), activation_checkpointing=on) for on in (False, True)
    ]
    assert found[0] == found[1]


def test_a_model_that_does_not_call_its_blocks_is_refused(options, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    source = inspect.getsource(model)
    call = "x = block(x, token_positions, caches[i] if caches else None)"
    inside = "x = x + block.attn(block.ln1(x)); x = x + block.ffn(block.ln2(x))"
    assert call in source
    mine.write_text(source.replace(call, inside))
    with pytest.raises(SystemExit):
        losses(options, tmp_path / "run", str(mine), activation_checkpointing=True)
    assert "must be off for a model that does not call the blocks" in capsys.readouterr().err


def test_kernels_that_bypass_the_blocks_are_not_used():
    network, tokens = model.TransformerLM(SHAPE), torch.zeros(4, 16, dtype=torch.long)
    with swap.using("fast"):
        if "CPULoss" not in str(trainer.batch_loss(network, tokens, tokens, 0.0).grad_fn):
            pytest.skip("there are no CPU training kernels for this machine")
        activation_checkpointing.apply(network)
        assert "CPULoss" not in str(trainer.batch_loss(network, tokens, tokens, 0.0).grad_fn)


@pytest.mark.parametrize("first", [False, True])
def test_a_run_is_resumed_with_and_without(options, tmp_path, first):
    whole = losses(options, tmp_path / "whole", activation_checkpointing=first)
    folder = tmp_path / "run"
    losses(options, folder, activation_checkpointing=first, steps=2)
    again = dataclasses.replace(options, resume=str(folder))
    assert losses(again, folder, activation_checkpointing=not first) == whole


@pytest.mark.slow
def test_the_estimate_is_lower_and_the_advice_is_given_once(options):
    big = dataclasses.replace(options, model=dataclasses.replace(SHAPE, n_layers=4, context_length=64))
    on = dataclasses.replace(big.train, activation_checkpointing=True)
    kept, recomputed = (
        memory.estimate(o, trainer.make_optimizer, trainer.batch_loss)
        for o in (big, dataclasses.replace(big, train=on))
    )
    assert recomputed.activations < 0.6 * kept.activations
    assert recomputed.parameters == kept.parameters
    advice = "or add --train.activation_checkpointing"
    assert advice in memory.describe(kept, big)
    assert advice not in memory.describe(recomputed, dataclasses.replace(big, train=on))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_draws_the_same_mask_twice(compiled):
    """Of a function that is homogeneous of degree 2, x times the gradient is twice the value."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([layers.Dropout(0.5)])
            self.weight = torch.nn.Parameter(torch.randn(1000))

        def forward(self, tokens):
            return self.layers[0](self.weight).square().sum()

    network = Model()
    activation_checkpointing.apply(network)
    value = (torch.compile(network) if compiled else network)(torch.zeros(1))
    value.backward()
    assert 300 < (network.weight.grad == 0).sum() < 700
    torch.testing.assert_close((network.weight * network.weight.grad).sum() / 2, value)
