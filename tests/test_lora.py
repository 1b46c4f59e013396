"""LoRA by hand and in runs. Alone: `uv run pytest tests/test_lora.py`."""

import dataclasses
import os
import re
import signal

import pytest
import small_models
import test_sft
import torch
from torch import nn

from llm_basics.alignment import lora
from llm_basics.cli import parse
from llm_basics.core import config, layers, trainer
from llm_basics.inference import adapters, engine
from llm_basics.interop import hf_export, hf_import, peft_adapters
from llm_basics.runs import checkpoint
from llm_basics.training import setup, sft

first_run, pretrained = test_sft.first_run, test_sft.pretrained


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


def lora_options(folder, name="chat", rank=2, **changes):
    options = test_sft.options_of(folder, name, **changes)
    return dataclasses.replace(options, fast="off", lora=config.LoRAConfig(rank=rank, alpha=8.0))


def tensors_of(folder):
    """All tensors of the newest checkpoint, and its state."""
    return checkpoint.read_checkpoint(checkpoint.find(folder / "checkpoints"))


def test_a_run_trains_and_saves_adapters_alone(pretrained, capsys):
    assert sft.main(lora_options(pretrained, steps=150, lr=0.02, eval_every=150, log_every=50)) == 0
    tensors, about = tensors_of(pretrained / "chat")
    base = tensors_of(pretrained / "old")[0]
    names = {name for name in tensors if name.startswith("model.")}
    assert all(name.endswith((".a", ".b", "_embeddings.rows", "lm_head.rows")) for name in names)
    assert len(names) == 7 * 2 + 2
    # the trained matrices and the two running means of AdamW, or Muon's one
    assert sum(t.nbytes for n, t in tensors.items() if n.startswith("optimizer.")) <= 2 * sum(
        tensors[name].nbytes for name in names
    )
    path = pretrained / "old" / "checkpoints" / "step_00000002.safetensors"
    assert about["base"] == {
        "checkpoint": str(path),
        "sha256": checkpoint.weights_sha256(path),
        "vocab_size": 257,
    }
    plain, _ = engine.load_run(pretrained / "chat")
    for name, weight in plain.state_dict().items():
        old = base[f"model.{name}"]
        if "proj" in name or ".w" in name:
            difference = weight - old
            assert 0 < torch.linalg.matrix_rank(difference, atol=1e-5) <= 2, name
        else:
            assert torch.equal(weight[: len(old)], old), name
    out = capsys.readouterr().out
    exact, of = map(int, re.search(r"exact match on (\d+) of (\d+)", out).groups())
    # three quarters of the answers, from samples of the merged model
    assert exact >= 0.75 * of and "adapters  rank 2, alpha 8: 1," in out


def test_a_resumed_lora_run_equals_an_uninterrupted_one(pretrained, monkeypatch):
    options = lora_options(pretrained)
    assert sft.main(options) == 0
    make_step = trainer.train_step

    def step_and_stop(*arguments):
        if arguments[3] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_and_stop)
        assert sft.main(dataclasses.replace(options, run_dir=f"{pretrained}/stopped")) == 143
    resume = ["--resume", f"{pretrained}/stopped"]
    with pytest.raises(SystemExit):
        sft.main(parse.train_options([*resume, "--lora.rank", "3"], preset="sft"))
    assert sft.main(parse.train_options(resume, preset="sft")) == 0
    one, other = (tensors_of(pretrained / name)[0] for name in ("chat", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_that_changed_or_is_gone_is_refused(pretrained):
    assert sft.main(lora_options(pretrained, steps=1)) == 0
    path = pretrained / "old" / "checkpoints" / "step_00000002.safetensors"
    source, optimizer = engine.load_run(pretrained / "old")[0], torch.optim.SGD([torch.zeros(1)])
    _, about = checkpoint.read_checkpoint(path)
    with torch.no_grad():
        source.ln_final.weight += 1
    kept = {k: v for k, v in about.items() if k not in checkpoint.COLLECTED}
    checkpoint.save_checkpoint(source, optimizer, 2, path, **kept)
    with pytest.raises(ValueError, match="must have the base weights of SHA-256 "):
        engine.load_run(pretrained / "chat")
    path.unlink()
    with pytest.raises(ValueError, match=r"step_00000002\.safetensors must exist: it has the base weights"):
        engine.load_run(pretrained / "chat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "--init_from must name the run to fine-tune"),
        (
            {"lora": config.LoRAConfig(2, targets="q_proj,gate")},
            "lora.targets must be all or of q_proj,k_proj,",
        ),
        ({"train": config.TrainConfig(parallel="fsdp2", device="cpu")}, "adapters are not sharded"),
    ],
)
def test_options_that_do_not_fit_are_refused(pretrained, capsys, changes, message):
    with pytest.raises(SystemExit):
        sft.main(dataclasses.replace(lora_options(pretrained), **changes))
    assert message in capsys.readouterr().err
    assert not (pretrained / "chat").exists()


def test_the_estimate_of_memory_knows_frozen_weights(pretrained):
    options = lora_options(pretrained)
    full = setup.estimate(dataclasses.replace(options, lora=config.LoRAConfig()))
    found = setup.estimate(options)
    assert found.gradients + found.optimizer < 0.35 * (full.gradients + full.optimizer)


# --------------------------------------------------------------------------------------------------
# PEFT's format


def adapted_model(name, rank=2, alpha=6.0, targets="all"):
    """A model of a layout of transformers, with random adapters and new tokens."""
    _, settings = small_models.SHAPES[name]
    lm = small_models.model(**settings)
    options = config.LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    adapters.apply(lm, options, lm.config.vocab_size - 3)
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


def test_adapters_that_are_not_plain_lora_are_refused(tmp_path):
    lm, options = adapted_model("llama")
    write_both(tmp_path, lm, options)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"bias": "none"', '"bias": "all"'))
    with pytest.raises(ValueError, match="bias must be none, got 'all'; merge it with PEFT"):
        hf_import.read_model(tmp_path / "base", str(tmp_path))
