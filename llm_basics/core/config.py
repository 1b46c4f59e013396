"""Every option of a run: name, type with limits, default and description."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llm_basics.core import option_types


@dataclass(frozen=True)
class ModelConfig(option_types.Options):
    """The shape of a transformer. The defaults are Llama's choices; configs/gpt2-small.yaml has GPT-2's."""

    prefix: ClassVar[str] = "model."

    vocab_size: option_types.VocabSize = 2048
    """Vocabulary size of a tokenizer trained with `--tokenizer bpe`. Other tokenizers have a fixed size."""
    context_length: option_types.Count = 256
    """Maximum sequence length in tokens."""
    d_model: option_types.Count = 256
    """Width of the residual stream."""
    n_layers: option_types.Count = 4
    """Number of transformer blocks."""
    n_heads: option_types.Count = 4
    """Number of attention heads per block, each of d_model / n_heads features."""
    n_kv_heads: option_types.Count | None = None
    """Number of key and value heads per block, shared by groups of query heads. None: n_heads."""
    d_ff: option_types.Count | None = None
    """Width of the feed-forward network. None: 4 d_model, or 8/3 d_model rounded up to 64s for swiglu."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """Normalization: rms (Llama), layer (GPT-2), or none."""
    norm_eps: option_types.PositiveFraction = 1e-5
    """Added to the variance in normalization, for numerical stability."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Normalize the input of each sublayer (pre), or its sum with the residual (post)."""
    position: Literal["rope", "learned", "none"] = "rope"
    """Position encoding: rotary embeddings (Llama), learned embeddings (GPT-2), or none."""
    rope_theta: option_types.Positive = 10000.0
    """Base of the rotary wavelengths (RoPE)."""
    ffn: Literal["swiglu", "gelu", "gelu_tanh", "relu2", "silu"] = "swiglu"
    """Feed-forward network: gated (swiglu), or plain with this activation. GPT-2 uses gelu_tanh."""
    qk_norm: bool = False
    """Apply RMSNorm to queries and keys before attention."""
    tie_embeddings: bool = False
    """Share the token embeddings with the output projection."""
    bias: bool = False
    """Add a bias to linear layers and LayerNorm. Not available with swiglu."""
    dropout: option_types.Decay = 0.0
    """Dropout probability in training."""
    init: Literal["truncated", "gpt2"] = "truncated"
    """Initial weights: normal of variance 2 / (d_in + d_out), truncated at 3 std, or GPT-2's (std 0.02)."""
    zero_init: bool = False
    """Zero the projections back to the residual stream, so that each block starts as the identity."""
    vocab_multiple: option_types.Count = 1
    """Pad the rows of embeddings and output projection to a multiple of this, such as 64 on GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            near = self.d_model // self.n_heads * self.n_heads
            raise ValueError(
                f"model.d_model must be divisible by model.n_heads, got {self.d_model} and {self.n_heads}; "
                f"try d_model {near or self.n_heads} or {near + self.n_heads}"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                "model.n_heads must be divisible by model.n_kv_heads, "
                f"got {self.n_heads} and {self.n_kv_heads}"
            )
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(
                f"d_model / n_heads must be even with position rope, got {self.d_head} "
                f"from d_model {self.d_model} and n_heads {self.n_heads}"
            )
        if self.ffn == "swiglu" and self.bias:
            raise ValueError(
                "model.bias must be off with ffn swiglu, got True; use ffn gelu, gelu_tanh, relu2 or silu"
            )

    @property
    def d_head(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.n_heads

    @property
    def d_kv(self) -> int:
        """Features of all key or value heads of a block together."""
        return self.d_head * (self.n_kv_heads or self.n_heads)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and of the output projection: the vocabulary, rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def d_hidden(self) -> int:
        """Width of the feed-forward network, with the default for `d_ff` None."""
        if self.d_ff is not None:
            return self.d_ff
        # three matrices of 8/3 d_model have as many weights as two of 4 d_model (arXiv 2002.05202)
        return -(-self.d_model * 8 // 3 // 64) * 64 if self.ffn == "swiglu" else 4 * self.d_model

    @property
    def n_matmul_params(self) -> int:
        """Weights in matrix multiplications: all matrices but the embeddings, with the output projection."""
        attention = 2 * self.d_model * (self.d_model + self.d_kv)
        ffn = (3 if self.ffn == "swiglu" else 2) * self.d_model * self.d_hidden
        return self.n_layers * (attention + ffn) + self.d_model * self.padded_vocab_size

    @property
    def n_parameters(self) -> int:
        """Number of weights, computed without a model; a tied matrix counts once."""
        rows = (0 if self.tie_embeddings else self.padded_vocab_size) + self.context_length * (
            self.position == "learned"
        )
        norm = {"rms": 1, "layer": 1 + self.bias, "none": 0}[self.norm] * self.d_model
        block = 2 * norm + 2 * self.d_head * self.qk_norm
        # biases of the four projections of attention and the two of the feed-forward network
        block += (3 * self.d_model + 2 * self.d_kv + self.d_hidden) * self.bias
        return self.n_matmul_params + rows * self.d_model + self.n_layers * block + norm

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token of a full context, forward and backward.

        `6 N + 12 n_layers d_model context_length`. N is `n_matmul_params`: each weight costs a multiplication
        and an addition forward, and twice that backward. The second term is attention's scores and weighted
        means, not halved for the causal mask (appendix B of PaLM, arXiv 2204.02311).
        """
        return 6 * self.n_matmul_params + 12 * self.n_layers * self.d_model * self.context_length


@dataclass(frozen=True)
class TrainConfig(option_types.Options):
    """Options of training: steps, optimizer, schedule, evaluation, checkpoints."""

    prefix: ClassVar[str] = "train."

    steps: option_types.Count = 1000
    """Number of optimizer steps."""
    batch_size: option_types.Count = 16
    """Number of sequences per forward pass."""
    grad_accumulation_steps: option_types.Count = 1
    """Number of forward passes whose gradients are averaged into one optimizer step."""
    stride: option_types.Count | None = None
    """Distance in tokens of the starts of two training sequences, which overlap if it is below
    model.context_length. None: model.context_length. Not used by sft."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon applies Muon to the matrices of the blocks and AdamW to all other weights."""
    lr: option_types.NonNegative = 3e-4
    """Peak learning rate, reached after warm-up."""
    min_lr: option_types.NonNegative | None = None
    """Final learning rate. None: lr / 10."""
    warmup_steps: int = 100
    """Number of steps of linear warm-up from 0 to lr."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Schedule of lr after warm-up: cosine decay, or constant with a linear decay at the end (wsd)."""
    decay_fraction: option_types.Fraction = 0.2
    """Share of the steps in which wsd decays."""
    momentum: option_types.Decay = 0.95
    """Momentum of Muon."""
    weight_decay: option_types.NonNegative = 0.1
    """Decoupled weight decay of matrices and embeddings. Norms and biases are not decayed."""
    betas: tuple[option_types.Decay, option_types.Decay] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and its square."""
    eps: option_types.Fraction = 1e-8
    """Added to AdamW's denominator, for numerical stability."""
    max_grad_norm: option_types.Positive = 1.0
    """Clip the global gradient norm to this value."""
    z_loss: option_types.NonNegative = 0.0
    """Weight of the squared log-normalizer in the loss, which keeps logits from drifting. 0: off."""
    seed: option_types.Seed = 0
    """Random seed of initial weights, data order, dropout and samples."""
    device: str = "auto"
    """Device: cuda, mps or cpu. auto: the first available of these."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward pass; weights stay float32. auto: bfloat16 on CUDA, else float32."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """Compile the model with torch.compile; graphs also captures steps as CUDA graphs, for small models.
    auto: on CUDA, graphs for small models and on for others; elsewhere off."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, a third more operations."""
    parallel: Literal["auto", "none", "ddp", "fsdp2", "mine"] = "auto"
    """Copy (ddp) or shard (fsdp2) the weights, or use your own class (mine). auto: ddp under torchrun."""
    offload: bool = False
    """Keep the shards of fsdp2 in CPU memory, and copy them to the GPU where they are used."""
    sharded_checkpoints: Literal["off", "on", "async"] = "off"
    """Save checkpoints of fsdp2 as a folder of shards, written while training continues (async)."""
    timeout_seconds: option_types.Positive = 10.0
    """Time that a process waits for the others within a step before it ends the job."""
    log_every: option_types.Count = 10
    """Number of steps between log lines of the training loss."""
    eval_every: option_types.Count = 250
    """Number of steps between evaluations on the held-out split."""
    eval_batches: option_types.Count = 20
    """Number of batches per evaluation. The final evaluation uses ten times as many."""
    sample_every: int = 500
    """Number of steps between samples of generated text. 0: only at the end."""
    sample_tokens: option_types.Length = 200
    """Number of tokens per sample."""
    sample_prompt: str | None = None
    """Prompt of samples. None: a line of the held-out split, preferably one that ends with a colon."""
    checkpoint_every: int = 500
    """Number of steps between checkpoints. 0: only at the end."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep, in addition to the best one. 0: all."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop (on CUDA, one step later), or skip the step."""
    on_spike: Literal["log", "skip"] = "log"
    """On a loss spike: log it, or log it and skip the step."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """On a failure to write a checkpoint or a log: stop, or warn and continue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile == "graphs" and self.grad_accumulation_steps > 1:
            raise ValueError(
                "train.grad_accumulation_steps must be 1 with train.compile graphs, since a graph overwrites "
                f"the gradients, got {self.grad_accumulation_steps}; try train.compile on"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"train.min_lr must be at most lr ({self.lr}), got {self.min_lr}")

    @property
    def final_lr(self) -> float:
        """The final learning rate, with the default for `min_lr` None."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class LoRAConfig(option_types.Options):
    """Low-rank adaptation: train small matrices beside those of a trained model (arXiv 2106.09685)."""

    prefix: ClassVar[str] = "lora."

    rank: option_types.Count | None = None
    """Rank of the adapters of --init_from, the only weights trained. None: train all weights."""
    alpha: option_types.Positive = 16.0
    """Scale of the adapters, divided by the rank."""
    targets: str = "all"
    """Projections of the blocks to adapt, such as q_proj,v_proj; all adapts every one."""


@dataclass(frozen=True)
class Config(option_types.Options):
    """Train a language model, by default on the source code of Python's standard library."""

    config: str = "tiny"
    """A preset or a YAML file of options. Presets: tiny, shakespeare, shakespeare-gpu, gpt2-nano,
    gpt2-small, gpt2-medium, llama-tiny, ts-17m, pretrain_small, pretrain_124m."""
    data: str = "stdlib"
    """Training text: a text, .jsonl or .parquet file, a folder, a quoted glob, stdlib (Python's standard
    library), a data set such as tinystories, or a folder made by llm_basics.prepare."""
    max_tokens: option_types.Count | None = None
    """Maximum number of tokens to prepare. None: all."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """On invalid UTF-8: stop with the position, or replace the bytes by U+FFFD."""
    fast: Literal["on", "off"] = field(default="on", metadata={"retired": {"triton": "on"}})
    """Use fast kernels in place of reference functions where this machine supports them."""
    val_fraction: option_types.ProperFraction = 0.1
    """Share of the documents held out for validation. A single document is split at its end."""
    tokenizer: str = "bpe"
    """Tokenizer: bpe (trained on the data), bytes, gpt2, a saved folder or a tokenizer.json."""
    data_dir: str = "data"
    """Folder of tokenized data, reused by later runs on the same text."""
    mine: str | None = None
    """A Python file with your pieces, used in place of the reference."""
    run_dir: str | None = None
    """Run directory. None: a new folder in runs/ named by date, time and config."""
    resume: str | None = None
    """Resume the run in this folder, or the newest in runs/ (auto)."""
    replay: str | None = None
    """Repeat the run in this folder to the last bit, with all changes made while it trained."""
    init_from: str | None = None
    """Warm start from the weights of a run or imported model, with its model options and tokenizer."""
    packing: Literal["on", "off"] = "off"
    """Pack several conversations into each sequence (sft only)."""
    find_lr: bool = False
    """Run a learning rate range test: plot the loss per rate and suggest one, without training."""
    deterministic: bool = False
    """Use only deterministic algorithms, which may be slower on a GPU."""
    wandb: bool = False
    """Log metrics to Weights & Biases as well; offline without an account."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        stride, most = self.train.stride, self.model.context_length
        if stride is not None and stride > most:
            raise ValueError(f"train.stride must be at most model.context_length {most}, got {stride}")
        if self.find_lr and self.resume is not None:
            raise ValueError(f"find_lr must be used without resume, got resume {self.resume}")
