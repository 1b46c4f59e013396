"""LoRA by hand and in runs. Alone: `uv run pytest tests/test_lora.py`."""

import dataclasses
import json
import os
import re
import signal

import pytest
import small_models
import test_sft
import torch
from torch import nn

from llm_basics.alignment import lora
from llm_basics.cli import commands, parse
from llm_basics.core import config, layers, trainer
from llm_basics.fast import trainer as fast_trainer
from llm_basics.inference import adapters, engine
from llm_basics.interop import hf_export, hf_import, peft_adapters
from llm_basics.runs import checkpoint
from llm_basics.training import setup, sft

# the projections of a block with a gated feed-forward network
PROJECTIONS = {f"attn.{name}_proj" for name in ("q", "k", "v", "output")} | {f"ffn.w{i}" for i in (1, 2, 3)}


def adapted(rank=3, alpha=5.0, dropout=0.0):
    """A layer in float64 whose A and B are not zero."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(layers.Linear(6, 4, bias=True, dtype=torch.float64), rank, alpha, dropout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_output_and_gradients_equal_the_formula():
    layer, x, weighting = adapted(), torch.randn(7, 6).double(), torch.randn(7, 4).double()
    weight, bias, a, b = (t.detach() for t in (layer.base.weight, layer.base.bias, layer.a, layer.b))
    output = layer(x)
    (output * weighting).sum().backward()
    exact = {"rtol": 1e-6, "atol": 1e-12}
    expected = x @ weight.T + bias + 5 / 3 * (x @ a.T @ b.T)
    torch.testing.assert_close(output, expected, **exact)
    torch.testing.assert_close(layer.a.grad, 5 / 3 * (b.T @ weighting.T @ x), **exact)
    torch.testing.assert_close(layer.b.grad, 5 / 3 * (weighting.T @ x @ a.T), **exact)
    torch.testing.assert_close(layer.weight, weight + 5 / 3 * (b @ a), **exact)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_merged_equals_unmerged_and_back():
    layer, x = adapted().float(), torch.randn(50, 6)
    output, weight = layer(x), layer.base.weight.clone()
    lora.merge_lora(layer)
    torch.testing.assert_close(layer(x), output, rtol=1e-6, atol=1e-6)
    assert not torch.equal(layer.base.weight, weight) and layer.weight is layer.base.weight
    lora.unmerge_lora(layer)
    torch.testing.assert_close(layer.base.weight, weight, rtol=0, atol=1e-6)


def test_a_target_or_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"each target must be the name of a layer \(w1, w2, w3\), got w4"):
        lora.apply_lora(layers.SwiGLU(4, 8), ["w1", "w4"], 2, 4.0)
    with pytest.raises(ValueError, match="the rank must be at least 1, got 0"):
        lora.apply_lora(layers.SwiGLU(4, 8), ["w1"], 0, 4.0)
    one, other = (nn.ModuleDict({"w": layers.Linear(4, 4)}) for _ in range(2))
    lora.apply_lora(one, ["w"], 2, 4.0)
    lora.apply_lora(other, ["w"], 3, 4.0)
    with pytest.raises(ValueError, match="got another w.a, w.b; apply LoRA with the same targets and rank"):
        lora.load_lora_state(one, lora.lora_state(other))


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def base(untrained_run, tmp_path):
    """A run without a chat's tokens, `old`, beside a file of conversations; the folder of both."""
    untrained_run("old")
    records = [{"prompt": f"{a}{b}?", "completion": a} for a in "abcdefgh" for b in "stuv"]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def options_of(folder, name="chat", fast="off", rank=2, **changes):
    options = test_sft.options_of(folder, name, **{"lr": 0.02, "warmup_steps": 0, **changes})
    return dataclasses.replace(options, fast=fast, lora=config.LoRAConfig(rank=rank, alpha=8.0))


def newest(folder):
    """All tensors of the newest checkpoint, and its state."""
    return checkpoint.read_checkpoint(checkpoint.find(folder / "checkpoints"))


def test_a_run_trains_and_saves_adapters_alone(base, capsys):
    assert sft.main(options_of(base)) == 0
    tensors, about = newest(base / "chat")
    old = newest(base / "old")[0]
    trained = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    pairs = {f"layers.0.{name}.{matrix}" for name in PROJECTIONS for matrix in "ab"}
    assert trained == pairs | {"token_embeddings.rows", "lm_head.rows"}
    shapes = {tensor.shape for name, tensor in tensors.items() if name.startswith("optimizer.")}
    assert shapes <= {tensors[f"model.{name}"].shape for name in trained}
    path = base / "old" / "checkpoints" / "step_00000000.safetensors"
    sha256 = checkpoint.weights_sha256(path)
    assert about["base"] == {"checkpoint": str(path), "sha256": sha256, "vocab_size": 257}
    for name, weight in engine.load_run(base / "chat")[0].state_dict().items():
        before = old[f"model.{name}"]
        if name.removeprefix("layers.0.").removesuffix(".weight") in PROJECTIONS:
            assert 0 < torch.linalg.matrix_rank(weight - before, atol=1e-5) <= 2, name
        else:
            assert torch.equal(weight[: len(before)], before), name
    assert "adapters  rank 2, alpha 8: 624 of 11,200 parameters trained" in capsys.readouterr().out


def test_a_merged_model_equals_the_adapted_one(base):
    options = options_of(base)
    assert sft.main(options) == 0
    merged, _ = engine.load_run(base / "chat")
    path = checkpoint.find(base / "chat" / "checkpoints")
    adapted = engine.load_adapted(path, dataclasses.replace(options, model=merged.config))
    tokens = torch.randint(261, (4, 24))
    with torch.no_grad():
        found, expected = merged(tokens), adapted(tokens)
    assert all(layer.b.abs().max() > 1e-3 for _, layer in lora.lora_layers(adapted))
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("fast", ["off", "on"])
def test_a_resumed_run_equals_an_uninterrupted_one(base, monkeypatch, fast):
    """All tensors: adapters, optimizer and random generators."""
    settings = {"fast": fast, "sample_every": 2, "rank": 16 if fast == "on" else 2}
    assert sft.main(options_of(base, **settings)) == 0
    make_step = trainer.train_step

    def step_and_stop(*arguments):
        if arguments[3] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_and_stop)
        assert sft.main(options_of(base, "stopped", **settings)) == 128 + signal.SIGTERM
    resume = ["--resume", f"{base}/stopped"]
    with pytest.raises(SystemExit):
        sft.main(parse.train_options([*resume, "--lora.alpha", "3"], preset="sft"))
    assert sft.main(parse.train_options(resume, preset="sft")) == 0
    one, other = (newest(base / name)[0] for name in ("chat", "stopped"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_base_that_changed_or_is_gone_is_refused(base):
    assert sft.main(options_of(base, steps=1)) == 0
    path = base / "old" / "checkpoints" / "step_00000000.safetensors"
    expected = checkpoint.weights_sha256(path)
    source = engine.load_run(base / "old")[0]
    with torch.no_grad():
        source.ln_final.weight += 1
    checkpoint.save_checkpoint(source, torch.optim.SGD(source.parameters()), 0, path)
    for found in (checkpoint.weights_sha256(path), "no such file"):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} must .* {expected}, got {found}; put"):
            engine.load_run(base / "chat")
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "--init_from must name the run to fine-tune"),
        ({"lora": config.LoRAConfig(2, targets="q_proj,gate")}, "lora.targets must be all or of q_proj,k_"),
        ({"train": config.TrainConfig(parallel="fsdp2", device="cpu")}, "adapters are not sharded"),
    ],
)
def test_options_that_do_not_fit_are_refused(base, capsys, changes, message):
    with pytest.raises(SystemExit):
        sft.main(dataclasses.replace(options_of(base), **changes))
    assert message in capsys.readouterr().err
    assert not (base / "chat").exists()


@pytest.mark.whole_run
def test_the_estimate_of_memory_knows_frozen_weights(base):
    options = options_of(base)
    found, full = (setup.estimate(dataclasses.replace(options, lora=config.LoRAConfig(r))) for r in (2, None))
    assert found.gradients + found.optimizer < 0.35 * (full.gradients + full.optimizer)


@pytest.mark.parametrize("n_new", [0, 3])
def test_the_loss_in_chunks_has_the_gradients_of_adapters(monkeypatch, n_new):
    """Large batches are computed chunk by chunk, with an output projection that may be frozen."""
    monkeypatch.setattr(fast_trainer, "MAX_LOGITS", {"cpu": 1})
    monkeypatch.setattr(fast_trainer, "MIN_ROWS", 32)
    lm, _ = adapted_model("llama", targets="q_proj,w2", n_new=n_new)
    tokens = torch.randint(lm.config.vocab_size, (2, 2, 40))
    found = []
    for batch_loss in (fast_trainer.batch_loss, trainer.batch_loss):
        lm.zero_grad()
        batch_loss(lm, *tokens, 0.0).backward()
        found.append([p.grad for p in lm.parameters() if p.requires_grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# PEFT's format


def adapted_model(name, rank=2, alpha=6.0, targets="all", n_new=3):
    """A model of a layout of transformers, with random adapters and new tokens."""
    _, settings = small_models.SHAPES[name]
    lm = small_models.model(**settings)
    options = config.LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    adapters.apply(lm, options, lm.config.padded_vocab_size - n_new)
    return small_models.randomize_(lm), options


def write_both(folder, lm, options):
    """The base for transformers in `base`, the adapters for PEFT beside it."""
    (folder / "base").mkdir()
    hf_export.export(peft_adapters.without_adapters(lm), small_models.tokenizer(), folder / "base", "a card")
    peft_adapters.write(folder, *peft_adapters.to_peft(lm, options, str(folder / "base")))


LAYOUTS = [
    ("llama-grouped", "all"),
    ("gpt2", "all"),
    ("gpt2-untied", "q_proj,v_proj,w1"),
    ("qwen3", "q_proj"),
]
each_layout = pytest.mark.parametrize(("name", "targets"), LAYOUTS)


@each_layout
def test_adapters_in_the_format_of_peft_are_merged_on_import(tmp_path, name, targets):
    lm, options = adapted_model(name, targets=targets)
    tokens = torch.randint(lm.config.vocab_size, (2, 12))
    write_both(tmp_path, lm, options)
    found, _ = hf_import.read_model(tmp_path / "base", str(tmp_path))
    torch.testing.assert_close(found(tokens), lm(tokens), rtol=1e-4, atol=1e-4)
    base, _ = hf_import.read_model(tmp_path / "base")
    assert (base(tokens) - lm(tokens)).abs().max() > 0.1


@each_layout
def test_peft_gives_the_same_logits(tmp_path, name, targets):
    """Where PEFT is installed: `uv run --with peft pytest -s tests/test_lora.py -k peft_gives`."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    lm, options = adapted_model(name, targets=targets)
    tokens = torch.randint(lm.config.vocab_size, (2, 12))
    write_both(tmp_path, lm, options)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        difference = (theirs(tokens).logits - lm(tokens)).abs().max() / lm(tokens).abs().max()
    print(f"{name}: relative difference of the logits {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias must be none, got 'all'; merge it with PEFT"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'; merge it with PEFT"),
        ({"alpha_pattern": {"q.*": 3}}, "alpha_pattern must have names of layers, got 'q.[*]'; merge"),
        ({"r": 5}, "lora_A.weight must have rank 5, got 2"),
        ({"r": None}, "adapter_config.json must describe adapters of PEFT"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, change, message):
    lm, options = adapted_model("llama")
    write_both(tmp_path, lm, options)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        hf_import.read_model(tmp_path / "base", str(tmp_path))


def test_export_and_import_of_a_run(base):
    """The command: a run to PEFT's files and their base, and back to a run of the same logits."""
    assert sft.main(options_of(base)) == 0
    tokens = torch.randint(261, (2, 24))
    expected = engine.load_run(base / "chat")[0](tokens)
    out, whole, back = (str(base / name) for name in ("peft", "whole", "back"))
    assert hf_export.main(commands.ExportConfig(run_dir=f"{base}/chat", out=out, adapters=True)) == 0
    assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors", "base"]
    assert hf_export.main(commands.ExportConfig(run_dir=f"{base}/chat", out=whole)) == 0
    assert hf_import.main(commands.ImportConfig(folder=f"{out}/base", out=back, adapters=out)) == 0
    for found in (engine.load_run(back)[0], hf_import.read_model(base / "whole")[0]):
        assert (found(tokens) - expected).norm() < 1e-6 * expected.norm()
    with pytest.raises(SystemExit):
        hf_export.main(commands.ExportConfig(run_dir=f"{base}/old", out=f"{base}/no", adapters=True))
