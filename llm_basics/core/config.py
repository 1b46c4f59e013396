"""Every option of a run: its name, default and meaning."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer. The defaults are Llama's choices; configs/gpt2-small.yaml has GPT-2's."""

    vocab_size: int = 2048
    """Size of the vocabulary. `--tokenizer bpe` learns one of this size; other tokenizers bring their own."""
    context_length: int = 256
    """The most tokens that the model sees at once."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of transformer blocks."""
    n_heads: int = 4
    """Attention heads in a block; each has d_model / n_heads features."""
    n_kv_heads: int | None = None
    """Key and value heads in a block, shared by groups of query heads. None: as many as n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward network. None: 4 d_model; for swiglu 8/3 d_model, rounded up to 64s."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """Normalization: rms (Llama), layer (GPT-2), or none at all, to see what it is good for."""
    norm_eps: float = 1e-5
    """Added to the variance before the square root."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Normalize the input of each sublayer (pre) or its sum with the residual (post)."""
    position: Literal["rope", "learned", "none"] = "rope"
    """Where tokens stand: rotary embeddings (Llama), learned ones (GPT-2), or not told."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    ffn: Literal["swiglu", "gelu", "gelu_tanh", "relu2", "silu"] = "swiglu"
    """Feed-forward network: gated (swiglu), or plain with this activation. GPT-2 has gelu_tanh."""
    qk_norm: bool = False
    """Normalize queries and keys before attention."""
    tie_embeddings: bool = False
    """Use the token embeddings as the output projection as well."""
    bias: bool = False
    """Give linear layers and LayerNorm a bias. swiglu has none."""
    dropout: float = 0.0
    """Share of activations zeroed while training."""
    init: Literal["truncated", "gpt2"] = "truncated"
    """Initial weights: normal of variance 2 / (d_in + d_out) cut at 3 std, or GPT-2's 0.02."""
    zero_init: bool = False
    """Start the projections that lead back to the residual stream at 0: at first no block changes it."""
    vocab_multiple: int = 1
    """Round the rows of embeddings and output up to a multiple (64 on GPUs); no id is drawn from the rest."""

    def __post_init__(self) -> None:
        counts = "vocab_size context_length d_model n_layers n_heads n_kv_heads d_ff vocab_multiple"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
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
                f"RoPE needs an even d_model / n_heads, got {self.d_head} "
                f"from d_model {self.d_model} and n_heads {self.n_heads}"
            )
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be at least 0 and below 1, got {self.dropout}")
        if self.ffn == "swiglu" and self.bias:
            raise ValueError("model.bias goes with ffn gelu, gelu_tanh, relu2 or silu; swiglu has no biases")

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
        """Width of the feed-forward network, chosen if `d_ff` is None."""
        if self.d_ff is not None:
            return self.d_ff
        # three matrices of 8/3 hold as many weights as two of 4 (arXiv 2002.05202)
        return -(-self.d_model * 8 // 3 // 64) * 64 if self.ffn == "swiglu" else 4 * self.d_model

    @property
    def n_matmul_params(self) -> int:
        """Weights that multiply: all matrices but the embeddings, the output projection included."""
        attention = 2 * self.d_model * (self.d_model + self.d_kv)
        ffn = (3 if self.ffn == "swiglu" else 2) * self.d_model * self.d_hidden
        return self.n_layers * (attention + ffn) + self.d_model * self.padded_vocab_size

    @property
    def n_parameters(self) -> int:
        """Number of weights, a tied matrix counted once, known without making them."""
        rows = (0 if self.tie_embeddings else self.padded_vocab_size) + self.context_length * (
            self.position == "learned"
        )
        norm = {"rms": 1, "layer": 1 + self.bias, "none": 0}[self.norm] * self.d_model
        block = 2 * norm + 2 * self.d_head * self.qk_norm
        # of the four projections of attention and the two of the feed-forward network
        block += (3 * self.d_model + 2 * self.d_kv + self.d_hidden) * self.bias
        return self.n_matmul_params + rows * self.d_model + self.n_layers * block + norm

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token of a full context, forward and backward.

        `6 N + 12 n_layers d_model context_length`. N is `n_matmul_params`: each weight costs a multiplication
        and an addition forward, and twice that backward. The second term is attention's scores and mixtures,
        not halved for the causal mask (appendix B of PaLM, arXiv 2204.02311).
        """
        return 6 * self.n_matmul_params + 12 * self.n_layers * self.d_model * self.context_length


@dataclass(frozen=True)
class TrainConfig:
    """How a model learns."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 16
    """Sequences in one forward pass."""
    grad_accumulation_steps: int = 1
    """Forward passes whose gradients are averaged into one step."""
    stride: int | None = None
    """Tokens between the starts of two training windows of text. None: model.context_length, side by side;
    smaller: windows overlap. Not for conversations (sft)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon steps the matrices of the blocks in orthogonal directions, and leaves the rest to adamw."""
    lr: float = 3e-4
    """Peak learning rate, reached after the warm-up."""
    min_lr: float | None = None
    """Learning rate at the end. None: a tenth of lr."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0 to lr."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How lr falls: as half a cosine, or not until the last steps, and then on a line (wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd falls."""
    momentum: float = 0.95
    """Decay of Muon's running mean of the gradient."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients that are longer together are shortened to this norm."""
    z_loss: float = 0.0
    """Weight of the squared log-normalizer in the loss; keeps logits from drifting."""
    seed: int = 0
    """Fixes initial weights, data order, dropout and samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto: bfloat16 on CUDA, else float32. Weights stay float32."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """Compile the model with torch.compile, which takes a while before the first step. graphs starts all
    kernels at once as well, for models so small that a GPU waits for the next kernel. auto: on CUDA, and
    small models as graphs."""
    log_every: int = 10
    """Steps between lines of training loss."""
    eval_every: int = 250
    """Steps between evaluations on held-out text."""
    eval_batches: int = 20
    """Batches in an evaluation during training; the one at the end takes ten times as many."""
    sample_every: int = 500
    """Steps between samples of generated text. 0: only at the end."""
    sample_tokens: int = 200
    """Tokens in a sample."""
    sample_prompt: str | None = None
    """Text that a sample continues. None: a held-out line, if possible one that ends with a colon."""
    checkpoint_every: int = 500
    """Steps between checkpoints. 0: only at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside the best. 0: all."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where loss or gradient is not finite: stop, or skip that step. CUDA stops one good step later."""
    on_spike: Literal["log", "skip"] = "log"
    """Where the loss is far above those before it: say so, or go on without that step too."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """Where a checkpoint or a log cannot be written: stop, or warn and train on."""

    def __post_init__(self) -> None:
        for name in "steps batch_size grad_accumulation_steps log_every eval_every eval_batches".split():
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        nonnegative = ("warmup_steps", "lr", "weight_decay", "eps", "z_loss", "seed")
        for name in (*nonnegative, "sample_every", "sample_tokens", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be at least 0, got {getattr(self, name)}")
        if not math.isfinite(self.lr):
            raise ValueError(f"train.lr must be finite, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be at least 0 and below 1, got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train.momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"train.decay_fraction must be from 0 to 1, got {self.decay_fraction}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"train.max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.compile == "graphs" and self.grad_accumulation_steps > 1:
            raise ValueError(
                "train.compile graphs must have one batch a step, since a graph writes its gradients where "
                f"those before were; got train.grad_accumulation_steps {self.grad_accumulation_steps}"
            )
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"train.min_lr must be from 0 to lr ({self.lr}), got {self.min_lr}")

    @property
    def final_lr(self) -> float:
        """Learning rate at the end."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class Config:
    """Train a language model, by default on the source code of Python's standard library."""

    config: str = "tiny"
    """A YAML file, or a preset: tiny, shakespeare, shakespeare-gpu, gpt2-nano, gpt2-small, gpt2-medium,
    llama-tiny, ts-17m, pretrain_small, pretrain_124m."""
    data: str = "stdlib"
    """A file of text, .jsonl or .parquet, a folder or a quoted glob of them; stdlib, the source of Python's
    own library; a data set, such as tinystories; or a folder that llm_basics.prepare has made."""
    max_tokens: int | None = None
    """Prepare no more of the data than this many tokens. None: take all."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8: stop and say where, or replace them by U+FFFD."""
    fast: Literal["on", "off"] = "on"
    """Use the kernels that replace reference functions on this machine; off: the reference alone."""
    val_fraction: float = 0.1
    """Share of the documents held out for validation; of a single document, its end."""
    tokenizer: str = "bpe"
    """bpe (learned from the data), bytes, gpt2 (fetched by tiktoken), a saved folder or a tokenizer.json."""
    data_dir: str = "data"
    """Folder for tokenized data, reused by later runs on the same text."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""
    run_dir: str | None = None
    """Folder for everything the run writes. None: runs/ with date, time and the name of the config."""
    resume: str | None = None
    """Go on with the run in this folder, or with the newest under runs/ (auto)."""
    init_from: str | None = None
    """Begin with the weights of this run or imported model, whose model options and tokenizer hold then."""
    packing: Literal["on", "off"] = "off"
    """For conversations (sft): several in a row as long as the context, or one a row of about its length."""
    find_lr: bool = False
    """Try learning rates from tiny to too large, draw the loss of each, propose one, and do not train."""
    deterministic: bool = False
    """Only algorithms that give the same result each time, where a GPU has faster ones that do not."""
    wandb: bool = False
    """Send metrics to Weights & Biases too; offline without an account."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
        if self.train.stride is not None and not 1 <= self.train.stride <= self.model.context_length:
            raise ValueError(
                f"train.stride must be from 1 to model.context_length {self.model.context_length}, got "
                f"{self.train.stride}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.find_lr and self.resume is not None:
            raise ValueError(f"find_lr must stand without resume, got {self.resume}: it begins anew")
