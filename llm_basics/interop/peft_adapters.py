"""Adapters in the file format of PEFT: adapter_model.safetensors and adapter_config.json.

PEFT scales the product of A and B by `lora_alpha / r`, as we do; its matrices have the names and row order of
transformers. If a layout concatenates several of our projections, A has the rows of all of them and B is
block-diagonal, with the sum of their ranks. Checked against PEFT 0.21.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from llm_basics.alignment import lora
from llm_basics.core import config, files, vocabulary
from llm_basics.core import model as models
from llm_basics.inference import adapters
from llm_basics.interop import hf_config, hf_weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# prefix of the names of modules of transformers
PREFIX = "base_model.model."

# options of PEFT that affect merged weights, with the supported values, the default first; other
# initializations change the base as well
PLAIN: dict[str, list[Any]] = {"peft_type": ["LORA"], "use_dora": [False], "bias": ["none"]}
PLAIN |= {"modules_to_save": [None, []], "lora_bias": [False], "layer_replication": [None]}
PLAIN |= {"init_lora_weights": [True, False, "gaussian"]}


def to_peft(
    model: models.TransformerLM, options: config.LoRAConfig, base: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of the adapters of a model; `base` is the base model for PEFT."""
    shape, found = model.config, dict(lora.lora_layers(model))
    layout = hf_config.find(shape)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for hf_name, names, _ in layout.modules(shape):
        if not any(name in found for name in names):
            continue
        parts = [_matrices(model, name, found.get(name)) for name in names]
        tensors[f"{PREFIX}{hf_name}.lora_A.weight"] = torch.cat([a for a, _ in parts])
        tensors[f"{PREFIX}{hf_name}.lora_B.weight"] = torch.block_diag(*(b for _, b in parts)).contiguous()
        suffix = next(name for name in layout.block_modules if hf_name.endswith(name))
        ranks[suffix] = sum(len(a) for a, _ in parts)
    assert options.rank is not None, "of a LoRA run"
    others = {name: rank for name, rank in ranks.items() if rank != options.rank}
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: options.alpha * rank / options.rank for name, rank in others.items()},
        "fan_in_fan_out": bool(layout.transposed),
        "inference_mode": True,
    }


def _matrices(model: models.TransformerLM, name: str, layer: lora.LoRALinear | None) -> tuple[Tensor, Tensor]:
    """A and B of a projection, the rows of B in the order of transformers; of rank 0 without an adapter."""
    if layer is None:
        d_out, d_in = model.get_parameter(f"{name}.weight").shape
        return torch.zeros(0, d_in), torch.zeros(d_out, 0)
    b = layer.b.detach()
    if hf_weights.is_rotated(name, model.config):
        b = hf_weights.permute_rope(b, model.config.d_head)
    return layer.a.detach().contiguous(), b.contiguous()


@torch.no_grad()
def without_adapters(model: models.TransformerLM) -> models.TransformerLM:
    """The plain base of an adapted model, with the trained rows of new tokens."""
    saved = {name: tensor.clone() for name, tensor in lora.lora_state(model).items()}
    for _, layer in lora.lora_layers(model):
        layer.b.zero_()
    base = adapters.merged(model)
    lora.load_lora_state(model, saved)
    return base


def add(tensors: dict[str, Tensor], folder: Path, read: Any) -> dict[str, Tensor]:
    """The weights of a model of transformers with PEFT's adapters in `folder` merged into them.

    `read` reads a safetensors file. Raises ValueError for adapters that are not plain LoRA or do not match.
    """
    with vocabulary.reading(f"{folder / CONFIG} must describe adapters of PEFT"):
        options = files.read_json(folder / CONFIG)
        for name, values in PLAIN.items():
            if options.get(name, values[0]) not in values:
                raise ValueError(f"{name} must be {values[0]}, got {options[name]!r}; merge it with PEFT")
        rank, alpha = int(options["r"]), float(options["lora_alpha"])
        ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
        for pattern, name in [("rank_pattern", n) for n in ranks] + [("alpha_pattern", n) for n in alphas]:
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(f"{pattern} must have names of layers, got {name!r}; merge it with PEFT")
    found, merged = read(folder / WEIGHTS), dict(tensors)
    for key in found:
        name, _, matrix = key.removeprefix(PREFIX).rpartition(".lora_")
        if matrix == "B.weight":
            continue
        weight = next((w for w in (f"{name}.weight", f"{name}.weight".partition(".")[2]) if w in tensors), "")
        if matrix != "A.weight" or not weight:
            raise ValueError(f"{folder / WEIGHTS}: {key} must be lora_A or lora_B of a layer of the model")
        a, b = found[key].float(), found[f"{key.removesuffix('A.weight')}B.weight"].float()
        if len(a) != _of(name, ranks, rank):
            raise ValueError(
                f"{folder / WEIGHTS}: {key} must have rank {_of(name, ranks, rank)}, got {len(a)}"
            )
        root = math.sqrt(len(a)) if options.get("use_rslora") else len(a)
        delta = _of(name, alphas, alpha) / root * (b @ a)
        merged[weight] = tensors[weight] + (delta.T if options.get("fan_in_fan_out") else delta)
    return merged


def _of(name: str, pattern: dict[str, Any], default: Any) -> Any:
    """The value of a layer: that of the first suffix of its name in `pattern`, or the default."""
    return next((v for key, v in pattern.items() if name == key or name.endswith(f".{key}")), default)


def write(folder: Path, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Write adapters to an existing folder."""
    files.write(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    files.write(folder / CONFIG, json.dumps(options, indent=2) + "\n")
