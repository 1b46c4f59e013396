"""The sockets between this package and the tests: one function a piece, plumbing only.

Names and parameters are those that the public CS336 assignment made a standard, so that its suite runs on
this file and this suite on anybody's: `uv run pytest --adapters=PATH`. Weights that are handed in are used
as they are, not copied into a layer, so that gradients reach them.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from llm_basics.alignment import (
    advantages,
    distillation,
    dpo,
    grpo_step,
    lora,
    packing,
    policy_gradient,
    response_log_probs,
    rewards,
)
from llm_basics.core import (
    bpe,
    config,
    dataloader,
    evaluate,
    generate,
    layers,
    model,
    optim,
    tokenizer,
    trainer,
)
from llm_basics.core import functional as F
from llm_basics.quality import deduplication, gopher, masking
from llm_basics.runs import checkpoint
from llm_basics.systems import (
    activation_checkpointing,
    collectives,
    data_parallel,
    flash_attention,
    fsdp,
    online_softmax,
    sharded_optimizer,
    tensor_parallel,
)


def call_with(module: nn.Module, weights: dict[str, Tensor], *inputs: Tensor | None) -> Tensor:
    """`module(*inputs)` with `weights` in the place of its parameters, all of them."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return functional_call(module, {**buffers, **weights}, inputs, strict=True)


# --------------------------------------------------------------------------------------------------
# Lookup and projection


def run_linear(
    d_in: int, d_out: int, weights: Float[Tensor, "d_out d_in"], in_features: Float[Tensor, "... d_in"]
) -> Float[Tensor, "... d_out"]:
    layer = layers.Linear(d_in, d_out, device=weights.device, dtype=weights.dtype)
    return call_with(layer, {"weight": weights}, in_features)


def run_embedding(
    vocab_size: int,
    d_model: int,
    weights: Float[Tensor, "vocab_size d_model"],
    token_ids: Int[Tensor, "..."],
) -> Float[Tensor, "... d_model"]:
    layer = layers.Embedding(vocab_size, d_model, device=weights.device, dtype=weights.dtype)
    return call_with(layer, {"weight": weights}, token_ids)


# --------------------------------------------------------------------------------------------------
# Scores and activations


def run_softmax(in_features: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    return F.softmax(in_features, dim)


def run_log_softmax(in_features: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    return F.log_softmax(in_features, dim)


def run_silu(in_features: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.silu(in_features)


def run_gelu(in_features: Float[Tensor, "..."], approximate: str = "none") -> Float[Tensor, "..."]:
    return F.gelu(in_features, approximate)


def run_relu2(in_features: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.relu2(in_features)


def run_swiglu(
    d_model: int,
    d_ff: int,
    w1_weight: Float[Tensor, "d_ff d_model"],
    w2_weight: Float[Tensor, "d_model d_ff"],
    w3_weight: Float[Tensor, "d_ff d_model"],
    in_features: Float[Tensor, "... d_model"],
) -> Float[Tensor, "... d_model"]:
    layer = layers.SwiGLU(d_model, d_ff, device=w1_weight.device, dtype=w1_weight.dtype)
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return call_with(layer, weights, in_features)


# --------------------------------------------------------------------------------------------------
# Normalization


def run_rmsnorm(
    d_model: int, eps: float, weights: Float[Tensor, " d_model"], in_features: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... d_model"]:
    layer = layers.RMSNorm(d_model, eps, device=weights.device, dtype=weights.dtype)
    return call_with(layer, {"weight": weights}, in_features)


def run_layernorm(
    d_model: int,
    eps: float,
    weights: Float[Tensor, " d_model"],
    bias: Float[Tensor, " d_model"],
    in_features: Float[Tensor, "... d_model"],
) -> Float[Tensor, "... d_model"]:
    layer = layers.LayerNorm(d_model, eps, device=weights.device, dtype=weights.dtype)
    return call_with(layer, {"weight": weights, "bias": bias}, in_features)


# --------------------------------------------------------------------------------------------------
# Attention


def run_rope(
    d_k: int,
    theta: float,
    max_seq_len: int,
    in_query_or_key: Float[Tensor, "... seq d_k"],
    token_positions: Int[Tensor, "... seq"],
) -> Float[Tensor, "... seq d_k"]:
    rope = layers.RotaryEmbedding(d_k, max_seq_len, theta, device=in_query_or_key.device)
    return rope(in_query_or_key, token_positions)


def run_scaled_dot_product_attention(
    Q: Float[Tensor, "... queries d_k"],
    K: Float[Tensor, "... keys d_k"],
    V: Float[Tensor, "... keys d_v"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
) -> Float[Tensor, "... queries d_v"]:
    return F.scaled_dot_product_attention(Q, K, V, mask)


def run_causal_attention(
    Q: Float[Tensor, "... queries d_k"],
    K: Float[Tensor, "... keys d_k"],
    V: Float[Tensor, "... keys d_v"],
) -> Float[Tensor, "... queries d_v"]:
    return F.scaled_dot_product_attention(Q, K, V, is_causal=True)


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Float[Tensor, "d_model d_in"],
    k_proj_weight: Float[Tensor, "d_model d_in"],
    v_proj_weight: Float[Tensor, "d_model d_in"],
    o_proj_weight: Float[Tensor, "d_in d_model"],
    in_features: Float[Tensor, "... seq d_in"],
) -> Float[Tensor, "... seq d_model"]:
    kind = {"device": q_proj_weight.device, "dtype": q_proj_weight.dtype}
    layer = layers.MultiHeadSelfAttention(d_model, num_heads, **kind)
    weights = attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return call_with(layer, weights, in_features)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Float[Tensor, "d_model d_in"],
    k_proj_weight: Float[Tensor, "d_model d_in"],
    v_proj_weight: Float[Tensor, "d_model d_in"],
    o_proj_weight: Float[Tensor, "d_in d_model"],
    in_features: Float[Tensor, "... seq d_in"],
    token_positions: Int[Tensor, "... seq"] | None = None,
) -> Float[Tensor, "... seq d_model"]:
    kind = {"device": q_proj_weight.device, "dtype": q_proj_weight.dtype}
    rope = layers.RotaryEmbedding(d_model // num_heads, max_seq_len, theta, device=kind["device"])
    layer = layers.MultiHeadSelfAttention(d_model, num_heads, rope=rope, **kind)
    weights = attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return call_with(layer, weights, in_features, token_positions)


def run_grouped_query_attention(
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    q_proj_weight: Float[Tensor, "d_model d_in"],
    k_proj_weight: Float[Tensor, "d_kv d_in"],
    v_proj_weight: Float[Tensor, "d_kv d_in"],
    o_proj_weight: Float[Tensor, "d_in d_model"],
    in_features: Float[Tensor, "... seq d_in"],
) -> Float[Tensor, "... seq d_model"]:
    kind = {"device": q_proj_weight.device, "dtype": q_proj_weight.dtype}
    layer = layers.MultiHeadSelfAttention(d_model, num_heads, num_kv_heads, **kind)
    weights = attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return call_with(layer, weights, in_features)


def run_cached_attention(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Float[Tensor, "d_model d_in"],
    k_proj_weight: Float[Tensor, "d_model d_in"],
    v_proj_weight: Float[Tensor, "d_model d_in"],
    o_proj_weight: Float[Tensor, "d_in d_model"],
    chunks: list[Float[Tensor, "batch _ d_in"]],
) -> Float[Tensor, "batch seq d_model"]:
    """Rotary attention that is given a text in pieces, and keeps the keys and values of the earlier ones."""
    d_head, dtype = d_model // num_heads, q_proj_weight.dtype
    rope = layers.RotaryEmbedding(d_head, max_seq_len, theta)
    layer = layers.MultiHeadSelfAttention(d_model, num_heads, rope=rope, dtype=dtype)
    weights = attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    layer.load_state_dict(weights)
    cache = layers.KVCache(chunks[0].shape[0], num_heads, max_seq_len, d_head, dtype=dtype)
    return torch.cat([layer(chunk, cache=cache) for chunk in chunks], dim=1)


def attention_weights(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "output_proj.weight": o}


# --------------------------------------------------------------------------------------------------
# The model


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq d_model"]:
    settings = config.ModelConfig(d_model=d_model, n_heads=num_heads, d_ff=d_ff, context_length=max_seq_len)
    kind = {"device": in_features.device, "dtype": in_features.dtype}
    rope = layers.RotaryEmbedding(settings.d_head, max_seq_len, theta, device=in_features.device)
    return call_with(model.TransformerBlock(settings, rope, **kind), weights, in_features)


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Int[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq vocab_size"]:
    settings = config.ModelConfig(
        vocab_size, context_length, d_model, num_layers, num_heads, d_ff=d_ff, rope_theta=rope_theta
    )
    kind = {"device": in_indices.device, "dtype": weights["lm_head.weight"].dtype}
    return call_with(model.TransformerLM(settings, **kind), weights, in_indices)


def get_linear(d_in: int, d_out: int) -> nn.Module:
    """With the weights that it starts with; so are the next ones."""
    return layers.Linear(d_in, d_out)


def get_embedding(vocab_size: int, d_model: int) -> nn.Module:
    return layers.Embedding(vocab_size, d_model)


def get_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    **choices: Any,
) -> nn.Module:
    """`choices` are further fields of the model's config, such as position="learned"."""
    settings = config.ModelConfig(
        vocab_size,
        context_length,
        d_model,
        num_layers,
        num_heads,
        d_ff=d_ff,
        rope_theta=rope_theta,
        **choices,
    )
    return model.TransformerLM(settings)


# --------------------------------------------------------------------------------------------------
# Training


def run_cross_entropy(
    inputs: Float[Tensor, "... vocab_size"], targets: Int[Tensor, "..."]
) -> Float[Tensor, ""]:
    return F.cross_entropy(inputs, targets)


def run_masked_cross_entropy(
    inputs: Float[Tensor, "... vocab_size"], targets: Int[Tensor, "..."], ignore_index: int
) -> Float[Tensor, ""]:
    return F.cross_entropy(inputs, targets, ignore_index)


def run_linear_cross_entropy(
    in_features: Float[Tensor, "... d_model"],
    weights: Float[Tensor, "vocab_size d_model"],
    targets: Int[Tensor, "..."],
) -> Float[Tensor, ""]:
    return F.linear_cross_entropy(in_features, weights, targets)


def run_gradient_clipping(parameters: Iterable[nn.Parameter], max_l2_norm: float) -> None:
    optim.clip_grad_norm_(parameters, max_l2_norm)


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    return optim.AdamW


def get_optimizer(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW over a model's parameters, in groups; `options` are fields of the training config."""
    return trainer.make_optimizer(model, config.TrainConfig(**options))


def run_train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]],
    it: int,
    **options: Any,
) -> dict[str, float]:
    """One step on all batches together; `it` counts from 1, `options` are fields of the training config."""
    result = trainer.train_step(model, optimizer, batches, it, config.TrainConfig(**options))
    loss, norm = (float(torch.as_tensor(x).detach()) for x in (result.train_loss, result.grad_norm))
    return {"train_loss": loss, "grad_norm": norm, "lr": result.lr}


def run_evaluate(
    model: nn.Module,
    batches: list[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]],
    token_bytes: Float[Tensor, " vocab"],
) -> dict[str, float]:
    return evaluate.evaluate(model, batches, token_bytes)


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    return optim.cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)


# --------------------------------------------------------------------------------------------------
# Tokenizer


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(vocab, merges, special_tokens)


def run_pretokenize(text: str, special_tokens: list[str]) -> list[str]:
    return list(bpe.pretokenize(text, special_tokens))


def run_train_bpe(
    input_path: str | os.PathLike[str], vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    return bpe.train_bpe(input_path, vocab_size, special_tokens, **kwargs)


# --------------------------------------------------------------------------------------------------
# Data


def run_get_batch(
    dataset: np.ndarray, batch_size: int, context_length: int, device: str
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    return dataloader.get_batch(dataset, batch_size, context_length, device)


def run_seeded_batch(
    dataset: np.ndarray, batch_size: int, context_length: int, seed: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    return dataloader.get_batch(dataset, batch_size, context_length, rng=np.random.default_rng(seed))


# --------------------------------------------------------------------------------------------------
# Checkpoints


def run_save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: str | os.PathLike | BinaryIO
) -> None:
    checkpoint.save_checkpoint(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike | BinaryIO, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    return checkpoint.load_checkpoint(src, model, optimizer)["step"]


# --------------------------------------------------------------------------------------------------
# Generation


def run_next_token_probabilities(
    logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "... vocab"]:
    return generate.next_token_probabilities(logits, temperature, top_k, top_p)


def run_generate(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    prompt: Int[Tensor, " seq"],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    shape = config.ModelConfig(
        vocab_size, context_length, d_model, num_layers, num_heads, d_ff=d_ff, rope_theta=rope_theta
    )
    lm = model.TransformerLM(shape, dtype=weights["lm_head.weight"].dtype)
    lm.load_state_dict(weights)
    return list(generate.generate(lm, prompt, max_new_tokens, temperature, top_k, top_p, generator=generator))


# --------------------------------------------------------------------------------------------------
# Systems


def run_online_softmax(
    tiles: Iterable[Float[Tensor, "... _"]],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    return online_softmax.online_softmax(tiles)


def run_log_sum_exp(tiles: Iterable[Float[Tensor, "... _"]]) -> Float[Tensor, "..."]:
    return online_softmax.log_sum_exp(tiles)


def run_online_weighted_sum(
    tiles: Iterable[Float[Tensor, "... _"]], values: Iterable[Float[Tensor, "... _ d_head"]]
) -> Float[Tensor, "... d_head"]:
    return online_softmax.online_weighted_sum(tiles, values)


def get_flashattention_autograd_function_pytorch() -> type[torch.autograd.Function]:
    return flash_attention.FlashAttention


def get_flashattention_autograd_function_triton() -> type[torch.autograd.Function]:
    # here, since Triton is not for every system
    from llm_basics.systems import flash_triton

    return flash_triton.FlashAttentionTriton


def run_checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, computed again in the backward pass."""
    return activation_checkpointing.checkpoint(function, *args)


def run_ring_reduce_scatter(tensor: Float[Tensor, " n"]) -> Float[Tensor, " chunk"]:
    """In a process group; so are the next ones."""
    return collectives.ring_reduce_scatter(tensor)


def run_ring_all_gather(chunk: Float[Tensor, " chunk"], n: int) -> Float[Tensor, " n"]:
    return collectives.ring_all_gather(chunk, n)


def run_ring_all_reduce(tensor: Float[Tensor, "..."]) -> None:
    collectives.ring_all_reduce(tensor)


def run_average_gradients(parameters: Iterable[Tensor]) -> None:
    data_parallel.average_gradients_(parameters)


def run_average_flat_gradients(parameters: Iterable[Tensor]) -> None:
    data_parallel.average_flat_gradients_(parameters)


def get_ddp(module: nn.Module) -> nn.Module:
    return data_parallel.DistributedDataParallel(module)


def ddp_on_after_backward(ddp_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ddp_model.finish_gradient_synchronization()


def get_sharded_optimizer(
    params: Iterable[Any], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    return sharded_optimizer.ShardedOptimizer(params, optimizer_cls, **kwargs)


def get_fsdp(module: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    return fsdp.FullyShardedDataParallel(module, compute_dtype)


def fsdp_on_after_backward(fsdp_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gradients of the shards are complete when backward returns."""


def fsdp_gather_full_params(fsdp_model: nn.Module) -> dict[str, Tensor]:
    return fsdp_model.gather_full_params()


def get_column_parallel_linear(linear: nn.Module) -> nn.Module:
    return tensor_parallel.ColumnParallelLinear(linear)


def get_row_parallel_linear(linear: nn.Module) -> nn.Module:
    return tensor_parallel.RowParallelLinear(linear)


def get_tensor_parallel_swiglu(ffn: nn.Module) -> nn.Module:
    return tensor_parallel.TensorParallelSwiGLU(ffn)


# --------------------------------------------------------------------------------------------------
# Alignment


def get_lora_linear(linear: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> nn.Module:
    return lora.LoRALinear(linear, rank, alpha, dropout)


def run_apply_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0
) -> list[str]:
    return lora.apply_lora(model, targets, rank, alpha, dropout)


def run_merge_lora(model: nn.Module) -> None:
    lora.merge_lora(model)


def run_unmerge_lora(model: nn.Module) -> None:
    lora.unmerge_lora(model)


def run_lora_state(model: nn.Module) -> dict[str, Tensor]:
    return lora.lora_state(model)


def run_load_lora_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    lora.load_lora_state(model, tensors)


def run_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    return lora.trainable_parameters(model)


def run_tokenize_prompt_and_output(
    prompt_strs: list[str], output_strs: list[str], tokenizer: Any
) -> dict[str, Tensor]:
    return response_log_probs.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)


def run_get_response_log_probs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    return_token_entropy: bool,
) -> dict[str, Tensor]:
    return response_log_probs.get_response_log_probs(model, input_ids, labels, return_token_entropy)


def run_compute_entropy(logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Of the edition of 2025; so are the next two."""
    return response_log_probs.compute_entropy(logits)


def run_masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return response_log_probs.masked_mean(tensor, mask, dim)


def run_masked_normalize(
    tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: int | float = 1.0
) -> Tensor:
    return response_log_probs.masked_normalize(tensor, mask, dim, normalize_constant)


def run_parse_gsm8k_response(model_output: str) -> str | None:
    return rewards.parse_gsm8k_response(model_output)


def run_parse_mmlu_response(mmlu_example: dict[str, Any], model_output: str) -> str | None:
    return rewards.parse_mmlu_response(mmlu_example, model_output)


def run_same_answer(answer: str | None, ground_truth: str) -> bool:
    return rewards.same_answer(answer, ground_truth)


def run_exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    return rewards.exact_match_reward(response, ground_truth)


def run_number_reward(response: str, ground_truth: str) -> dict[str, float]:
    return rewards.number_reward(response, ground_truth)


def run_tagged_answer_reward(response: str, ground_truth: str) -> dict[str, float]:
    return rewards.tagged_answer_reward(response, ground_truth)


def run_compute_rollout_rewards(
    reward_fn: Callable[[str, str], dict[str, float]],
    rollout_responses: list[str],
    repeated_ground_truths: list[str],
) -> tuple[Float[Tensor, " rollouts"], dict[str, float]]:
    return rewards.compute_rollout_rewards(reward_fn, rollout_responses, repeated_ground_truths)


def run_compute_group_normalized_rewards(
    raw_rewards: Float[Tensor, " rollouts"],
    group_size: int,
    baseline: str = "mean",
    advantage_eps: float = 1e-6,
    advantage_normalizer: str = "std",
) -> tuple[Float[Tensor, " rollouts"], dict[str, float]]:
    return advantages.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )


def run_importance_ratio(
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    method: str,
    response_mask: Tensor | None = None,
) -> Float[Tensor, "batch seq"]:
    return policy_gradient.importance_ratio(policy_log_probs, old_log_probs, method, response_mask)


def run_compute_policy_gradient_loss(
    raw_rewards_or_advantages: Tensor,
    policy_log_probs: Float[Tensor, "batch seq"],
    importance_reweighting_method: str = "none",
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    response_mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch seq"], dict[str, Tensor]]:
    return policy_gradient.compute_policy_gradient_loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method,
        old_log_probs,
        cliprange,
        response_mask,
    )


def run_kl_penalty(policy_log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k3") -> Tensor:
    return policy_gradient.kl_penalty(policy_log_probs, ref_log_probs, estimator)


def run_aggregate_loss_across_microbatch(
    per_token_policy_gradient_loss: Float[Tensor, "batch seq"],
    mask: Tensor,
    loss_normalization: str = "sequence",
    normalization_constant: int | float | None = None,
) -> Float[Tensor, ""]:
    return policy_gradient.aggregate_loss_across_microbatch(
        per_token_policy_gradient_loss, mask, loss_normalization, normalization_constant
    )


def run_accumulate_policy_gradient(
    model: nn.Module, tokens: dict[str, Tensor], advantage: Float[Tensor, " batch"], **choices: Any
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    return grpo_step.accumulate_policy_gradient(model, tokens, advantage, **choices)


def run_grpo_train_step(*args: Any, **kwargs: Any) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    return grpo_step.grpo_train_step(*args, **kwargs)


def run_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    return dpo.dpo_loss(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type, label_smoothing
    )


def run_sequence_log_probs(model: nn.Module, tokens: dict[str, Tensor]) -> Float[Tensor, " batch"]:
    return dpo.sequence_log_probs(model, tokens)


def run_compute_per_instance_dpo_loss(
    lm: nn.Module,
    lm_ref: nn.Module,
    tokenizer: Any,
    beta: float,
    prompt: str,
    response_chosen: str,
    response_rejected: str,
) -> Float[Tensor, ""]:
    return dpo.compute_per_instance_dpo_loss(
        lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected
    )


def get_packed_sft_dataset(
    tokenizer: Any, dataset_path: str | os.PathLike[str], seq_length: int, shuffle: bool
) -> Sequence[dict[str, Tensor]]:
    return packing.PackedSFTDataset(tokenizer, dataset_path, seq_length, shuffle)


def run_iterate_batches(
    dataset: Sequence[dict[str, Tensor]], batch_size: int, shuffle: bool
) -> Iterable[dict[str, Tensor]]:
    return packing.iterate_batches(dataset, batch_size, shuffle)


def run_kl_divergence(
    student_logits: Float[Tensor, "... vocab"],
    teacher_logits: Float[Tensor, "... teacher_vocab"],
    direction: str = "forward",
    temperature: float = 1.0,
) -> Float[Tensor, "..."]:
    return distillation.kl_divergence(student_logits, teacher_logits, direction, temperature)


def run_distillation_loss(
    student_logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "batch seq teacher_vocab"],
    labels: Int[Tensor, "batch seq"],
    mask: Tensor,
    **choices: Any,
) -> Float[Tensor, ""]:
    return distillation.distillation_loss(student_logits, teacher_logits, labels, mask, **choices)


def run_mask_emails(text: str) -> tuple[str, int]:
    return masking.mask_emails(text)


def run_mask_phone_numbers(text: str) -> tuple[str, int]:
    return masking.mask_phone_numbers(text)


def run_mask_ips(text: str) -> tuple[str, int]:
    return masking.mask_ips(text)


def run_gopher_quality_filter(text: str) -> bool:
    return gopher.gopher_quality_filter(text)


def run_mean_word_length(words: list[str]) -> float:
    return gopher.mean_word_length(words)


def run_ellipsis_fraction(text: str) -> float:
    return gopher.ellipsis_fraction(text)


def run_alphabetic_fraction(words: list[str]) -> float:
    return gopher.alphabetic_fraction(words)


def run_exact_line_deduplication(
    input_files: Sequence[str | os.PathLike[str]], output_directory: str | os.PathLike[str]
) -> None:
    deduplication.exact_line_deduplication(input_files, output_directory)


def run_normalize_text(text: str) -> str:
    return deduplication.normalize_text(text)


def run_word_ngrams(text: str, n: int) -> set[str]:
    return deduplication.word_ngrams(text, n)


def run_jaccard_similarity(first: set[str], second: set[str]) -> float:
    return deduplication.jaccard_similarity(first, second)


def run_minhash_signature(
    ngrams: set[str], coefficients: Int[np.ndarray, "two hashes"]
) -> Int[np.ndarray, " hashes"]:
    return deduplication.minhash_signature(ngrams, coefficients)


def run_candidate_pairs(
    signatures: Int[np.ndarray, "documents hashes"], num_bands: int
) -> set[tuple[int, int]]:
    return deduplication.candidate_pairs(signatures, num_bands)


def run_connected_groups(n_documents: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    return deduplication.connected_groups(n_documents, pairs)


def run_minhash_deduplication(
    input_files: Sequence[str | os.PathLike[str]],
    num_hashes: int,
    num_bands: int,
    ngrams: int,
    jaccard_threshold: float,
    output_directory: str | os.PathLike[str],
) -> None:
    deduplication.minhash_deduplication(
        input_files, num_hashes, num_bands, ngrams, jaccard_threshold, output_directory
    )
