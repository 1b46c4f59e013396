"""Baselines for the benchmarks: models of transformers and of torch's layers, with the same weights."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as tF

from llm_basics.core import config, dataloader, device
from llm_basics.core import model as models

OURS = "ours.safetensors"

GPT2_NAMES = {
    **{"ln_1": "ln1", "attn.c_proj": "attn.output_proj"},
    **{"ln_2": "ln2", "mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"},
}
LLAMA_NAMES = {
    **{f"self_attn.{name}_proj": f"attn.{name}_proj" for name in "qkv"},
    **{"input_layernorm": "ln1", "self_attn.o_proj": "attn.output_proj", "post_attention_layernorm": "ln2"},
    **{"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2"},
}


def write_weights(shape: config.ModelConfig, folder: Path) -> None:
    """Draw initial weights, and write them to `folder` in both formats, transformers' and ours."""
    torch.manual_seed(0)
    model = make(shape)
    model.save_pretrained(folder)
    theirs = model.state_dict()
    ours = gpt2_weights(theirs, shape) if shape.position == "learned" else llama_weights(theirs, shape)
    for name in ("token_embeddings.weight", "lm_head.weight"):
        # padding rows of the vocabulary
        ours[name] = torch.nn.functional.pad(
            ours[name], (0, 0, 0, shape.padded_vocab_size - shape.vocab_size)
        )
    safetensors.torch.save_file({name: w.clone().contiguous() for name, w in ours.items()}, folder / OURS)


def load_ours(shape: config.ModelConfig, folder: Path) -> models.TransformerLM:
    """This package's model with the weights in `folder`."""
    model = models.TransformerLM(shape)
    model.load_state_dict(safetensors.torch.load_file(folder / OURS))
    return model


def make(shape: config.ModelConfig) -> Any:
    """A GPT-2 or Llama of transformers with these sizes."""
    transformers = _transformers()

    if shape.position == "learned":
        about = {"n_positions": shape.context_length, "n_embd": shape.d_model, "n_layer": shape.n_layers}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=shape.vocab_size,
                n_head=shape.n_heads,
                layer_norm_epsilon=shape.norm_eps,
                activation_function="gelu_new",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
                **about,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.context_length,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_hidden,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads or shape.n_heads,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _transformers() -> Any:
    """transformers without progress bars and log lines."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return transformers


def gpt2_weights(theirs: Mapping[str, Tensor], shape: config.ModelConfig) -> dict[str, Tensor]:
    """Rename and transpose the weights of transformers' GPT-2, whose matrices are (d_in, d_out)."""
    ours = {
        "token_embeddings.weight": theirs["transformer.wte.weight"],
        "lm_head.weight": theirs["transformer.wte.weight"],
        "position_embeddings.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"ln_final.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(shape.n_layers):
            block, our_block = f"transformer.h.{i}", f"layers.{i}"
            for name, our_name in GPT2_NAMES.items():
                ours[f"{our_block}.{our_name}.{kind}"] = _transposed(theirs[f"{block}.{name}.{kind}"])
            rows = _transposed(theirs[f"{block}.attn.c_attn.{kind}"]).chunk(3)
            for part, its_rows in zip("qkv", rows, strict=True):
                ours[f"{our_block}.attn.{part}_proj.{kind}"] = its_rows
    return ours


def _transposed(weight: Tensor) -> Tensor:
    return weight.T if weight.dim() == 2 else weight


def llama_weights(theirs: Mapping[str, Tensor], shape: config.ModelConfig) -> dict[str, Tensor]:
    """Rename and permute the weights of transformers' Llama.

    Its RoPE pairs feature i with i + d_head/2, ours pairs neighbors: the same rotations in another order.
    """
    ours = {
        "token_embeddings.weight": theirs["model.embed_tokens.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
        "ln_final.weight": theirs["model.norm.weight"],
    }
    for i in range(shape.n_layers):
        for name, our_name in LLAMA_NAMES.items():
            weight = theirs[f"model.layers.{i}.{name}.weight"]
            if our_name in ("attn.q_proj", "attn.k_proj"):
                weight = rearrange(
                    weight, "(heads pair half) d -> (heads half pair) d", pair=2, half=shape.d_head // 2
                )
            ours[f"layers.{i}.{our_name}.weight"] = weight
    return ours


class TorchBlock(nn.Module):
    """A block of `TorchGPT`."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.output_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.w1, self.w2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.ln1(x)),
            "batch seq (three heads d_head) -> three batch heads seq d_head",
            three=3,
            heads=self.n_heads,
        )
        heads = tF.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output_proj(rearrange(heads, "batch heads seq d_head -> batch seq (heads d_head)"))
        return x + self.w2(tF.gelu(self.w1(self.ln2(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """A GPT-2 of torch's layers and attention, one product for queries, keys and values, as in nanoGPT."""

    def __init__(self, shape: config.ModelConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(shape.padded_vocab_size, shape.d_model)
        self.position_embeddings = nn.Embedding(shape.context_length, shape.d_model)
        self.layers = nn.ModuleList(TorchBlock(shape.d_model, shape.n_heads) for _ in range(shape.n_layers))
        self.ln_final = nn.LayerNorm(shape.d_model)
        renamed = {name.replace(".attn.", ".").replace(".ffn.", "."): w for name, w in weights.items()}
        for i, kind in itertools.product(range(shape.n_layers), ("weight", "bias")):
            parts = [renamed.pop(f"layers.{i}.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"layers.{i}.qkv.{kind}"] = torch.cat(parts)
        # tied to the token embeddings
        renamed.pop("lm_head.weight")
        self.load_state_dict(renamed)
        self.vocab_size = shape.vocab_size

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.token_embeddings(inputs) + self.position_embeddings(positions)
        for layer in self.layers:
            x = layer(x)
        logits = tF.linear(self.ln_final(x), self.token_embeddings.weight)[..., : self.vocab_size]
        return tF.cross_entropy(logits.flatten(0, -2), targets.flatten())


def make_step(
    name: str, folder: Path, chosen: torch.device, shape: config.ModelConfig, train: config.TrainConfig
) -> Callable[[dataloader.Batch], Tensor]:
    """A function that runs one training step of a contender, and returns the loss."""
    is_torch, is_compiled = name.startswith("torch.nn"), name.endswith("compiled")
    model: Any
    if is_torch:
        model = TorchGPT(shape, safetensors.torch.load_file(folder / OURS))
    else:
        model = _transformers().AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model.to(chosen).train()
    trained: Any = torch.compile(model) if is_compiled else model
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps)

    def step(batch: dataloader.Batch) -> Tensor:
        inputs, targets = batch
        optimizer.zero_grad()
        with device.precision(chosen, train.dtype):
            if is_torch:
                loss = trained(inputs, targets)
            else:
                # targets are already shifted; `labels` alone would be shifted again
                loss = trained(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        return loss.detach()

    return step
