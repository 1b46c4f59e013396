"""Selects the implementation of each piece: reference, fast, or yours.

Every call goes through a module attribute, so replacing a piece is setting that attribute on its home module
in `core`, `systems`, `alignment` or `quality`. A fast implementation has the name, signature and results of
its reference; your piece has the name and signature, and the tests check its results. Yours has precedence
over the fast one.

    >>> with using("fast", log=lambda line: None):
    ...     origins()["bpe.train_bpe"]
    'llm_basics.fast.bpe'
    >>> origins()["bpe.train_bpe"]
    'llm_basics.core.bpe'
"""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_basics import user_code
from llm_basics.runs import console

CORE, FAST, SYSTEMS = "llm_basics.core", "llm_basics.fast", "llm_basics.systems"
ALIGNMENT, QUALITY = "llm_basics.alignment", "llm_basics.quality"

# modules of core that have fast implementations, in fast/ under the same file name
WITH_FAST = (
    "bpe",
    "tokenizer",
    "dataloader",
    "functional",
    "layers",
    "optim",
    "trainer",
    "generate",
    "evaluate",
)

# pieces of systems that user code can define, by their home module
OF_SYSTEMS = {
    "online_softmax": "online_softmax log_sum_exp online_weighted_sum",
    "flash_attention": "FlashAttention",
    "flash_triton": "FlashAttentionTriton",
    "activation_checkpointing": "checkpoint",
    "collectives": "ring_reduce_scatter ring_all_gather ring_all_reduce",
    "data_parallel": "average_gradients_ average_flat_gradients_ DistributedDataParallel",
    "sharded_optimizer": "ShardedOptimizer",
    "fsdp": "FullyShardedDataParallel",
    "tensor_parallel": "ColumnParallelLinear RowParallelLinear TensorParallelSwiGLU",
}

# pieces of alignment that user code can define, by their home module
OF_ALIGNMENT = {
    "lora": "LoRALinear apply_lora merge_lora unmerge_lora lora_state load_lora_state trainable_parameters",
    "response_log_probs": "tokenize_prompt_and_output get_response_log_probs compute_entropy masked_mean "
    "masked_normalize",
    "rewards": "parse_gsm8k_response parse_mmlu_response same_answer exact_match_reward number_reward "
    "tagged_answer_reward compute_rollout_rewards",
    "advantages": "compute_group_normalized_rewards",
    "policy_gradient": "importance_ratio compute_policy_gradient_loss kl_penalty "
    "aggregate_loss_across_microbatch",
    "grpo_step": "accumulate_policy_gradient grpo_train_step",
    "dpo": "dpo_loss sequence_log_probs compute_per_instance_dpo_loss",
    "packing": "PackedSFTDataset iterate_batches",
    "distillation": "kl_divergence distillation_loss",
}

# pieces of quality that user code can define, by their home module
OF_QUALITY = {
    "masking": "mask_emails mask_phone_numbers mask_ips",
    "gopher": "mean_word_length ellipsis_fraction alphabetic_fraction gopher_quality_filter",
    "deduplication": "exact_line_deduplication normalize_text word_ngrams jaccard_similarity "
    "minhash_signature candidate_pairs connected_groups minhash_deduplication",
}

# home modules outside of core; functions of `checkpoint` are replaced only by the catalogue of mistakes
HOMES_OUTSIDE_CORE = {"checkpoint": "llm_basics.runs.checkpoint"}
HOMES_OUTSIDE_CORE |= {home: f"{SYSTEMS}.{home}" for home in OF_SYSTEMS}
HOMES_OUTSIDE_CORE |= {home: f"{ALIGNMENT}.{home}" for home in OF_ALIGNMENT}
HOMES_OUTSIDE_CORE |= {home: f"{QUALITY}.{home}" for home in OF_QUALITY}

# pieces that user code can define, by their home module
PIECES = {
    "functional": "linear embedding softmax log_softmax silu gelu relu2 swiglu dropout rms_norm layer_norm "
    "rope_tables apply_rope causal_mask scaled_dot_product_attention cross_entropy linear_cross_entropy",
    "layers": "Linear Embedding Dropout RMSNorm LayerNorm SwiGLU MLP RotaryEmbedding MultiHeadSelfAttention",
    "model": "TransformerBlock TransformerLM",
    "optim": "cosine_schedule clip_grad_norm_ adamw_update AdamW",
    "bpe": "pretokenize count_pretokens learn_merges train_bpe",
    "tokenizer": "Tokenizer",
    "dataloader": "get_batch",
    "evaluate": "evaluate",
    "generate": "next_token_probabilities generate",
    "trainer": "train_step make_optimizer compute_loss",
    **OF_SYSTEMS,
    **OF_ALIGNMENT,
    **OF_QUALITY,
}
HOMES = {name: home for home, names in PIECES.items() for name in names.split()}

# pieces that a fast implementation calls as its reference does, so that user code is not bypassed
STILL_CALLED = {"trainer.train_step": {"optim.clip_grad_norm_"}}

# reference versions of pieces, stored when they are first replaced
_REFERENCE: dict[str, Any] = {}


def use(
    what: str | Path,
    log: Callable[[str], None] = console.print_line,
    prepare: Callable[[types.ModuleType], None] = lambda module: None,
) -> None:
    """Use the fast implementations ("fast"), or the pieces of a Python file, until the program ends.

    Until torch is imported, only loaded modules of core are replaced by their fast implementations.
    `prepare` is called with the module of the file before its pieces are used. Raises ValueError, with
    nothing replaced, for a file that fails to run or has a piece with another signature.
    """
    if str(what) == "fast":
        _use_fast(log)
        return
    if not str(what).endswith(".py"):
        raise ValueError(
            f"the implementation must be fast or a Python file with your pieces, got {str(what)!r}"
        )
    for piece, own in _load(what, log, prepare).items():
        set_piece(piece, own)
    for piece in fast_pieces():
        if set(user_pieces()) & _bypassed(piece):
            set_piece(piece, reference(piece))


def use_for_command(mine: str | None, fast: str) -> None:
    """Apply a command's options `--mine` and `--fast`; messages go to standard error."""
    if mine is not None:
        use(mine)
        print(f"pieces    {describe()}", file=sys.stderr)
    if fast == "on":
        use("fast", log=lambda line: print(line, file=sys.stderr))


def _load(
    path: str | Path, log: Callable[[str], None], prepare: Callable[[types.ModuleType], None]
) -> dict[str, Any]:
    """The pieces of a Python file, checked against the reference: `functional.softmax` -> the function.

    While the file runs, placeholders replace the reference versions of the pieces that it defines.
    """
    defined = {name: f"{HOMES[name]}.{name}" for name in user_code.names(path) if name in HOMES}
    references = {piece: reference(piece) for piece in defined.values()}
    withheld = {
        piece: user_code.withheld(piece, isinstance(own, type), path) for piece, own in references.items()
    }
    with replaced(withheld):
        module = user_code.execute(path)
        prepare(module)
    found = {}
    for name, piece in defined.items():
        own = getattr(module, name, None)
        if isinstance(own, types.ModuleType):
            continue  # a module with the name of one of its pieces
        if not callable(own):
            log(f"{name} of {path} is not used: it is neither a function nor a class")
            continue
        if user_code.is_written_in(module, own, path):
            found[piece] = user_code.fit(name, own, references[piece], path)
        else:
            origin = getattr(own, "__module__", None) or type(own).__name__
            log(f"{name} of {path} is not used: it is imported from {origin}, not written in the file")
    if not found:
        raise ValueError(f"{path} must define a piece (such as softmax or RMSNorm), got none")
    return found


def piece(key: str) -> str:
    """The current key of a piece that an older version may have stored under another module.

    >>> piece("session.make_optimizer")
    'trainer.make_optimizer'
    """
    name = key.rpartition(".")[2]
    return f"{HOMES[name]}.{name}" if name in HOMES else key


def reference(piece: str) -> Any:
    """The reference version of a piece such as `functional.softmax`."""
    return _REFERENCE.get(piece) or current(piece)


def set_piece(piece: str, replacement: Any) -> None:
    """Replace a piece in its home module."""
    if current(piece) is replacement:
        return
    home, name = piece.split(".")
    _REFERENCE.setdefault(piece, reference(piece))
    setattr(_module(home), name, replacement)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore the current pieces at the end of the context."""
    before = {piece: current(piece) for piece in _REFERENCE}
    try:
        yield
    finally:
        for piece, original in _REFERENCE.items():
            set_piece(piece, before.get(piece, original))


@contextlib.contextmanager
def replaced(pieces: Mapping[str, Any]) -> Iterator[None]:
    """Replace `pieces` within the context."""
    with restored():
        for piece, replacement in pieces.items():
            set_piece(piece, replacement)
        yield


def reference_only() -> contextlib.AbstractContextManager[None]:
    """Use only reference code within the context."""
    return replaced(dict(_REFERENCE))


@contextlib.contextmanager
def using(what: str | Path, log: Callable[[str], None] = console.print_line) -> Iterator[None]:
    """`use` within the context."""
    with restored():
        use(what, log)
        yield


def origins() -> dict[str, str]:
    """The module or file in use for each piece of the loaded modules."""
    pieces = [f"{home}.{name}" for home, names in PIECES.items() for name in names.split()]
    return {
        piece: user_code.origin(current(piece))
        for piece in dict.fromkeys([*pieces, *_REFERENCE])
        if HOMES_OUTSIDE_CORE.get(home := piece.split(".")[0], f"{CORE}.{home}") in sys.modules
    }


def fast_pieces() -> list[str]:
    """The pieces whose fast implementation is in use."""
    return [piece for piece, origin in origins().items() if origin.startswith(f"{FAST}.")]


def user_pieces() -> dict[str, str]:
    """The pieces in use that come from user code, with their file."""
    return {piece: origin for piece, origin in origins().items() if user_code.is_of_file(origin)}


def describe() -> str:
    """The pieces in use as one line: user code by name, fast implementations by number."""
    files: dict[str, list[str]] = {}
    for piece, origin in user_pieces().items():
        files.setdefault(origin, []).append(piece.split(".")[1])
    parts = [f"{', '.join(names)} from {origin}" for origin, names in files.items()]
    if n_fast := len(fast_pieces()):
        parts.append(f"fast kernels for {n_fast} functions (disable with --fast off)")
    return "; ".join([*parts, "reference code for the rest"]) if parts else "reference code"


def prepare_model(model: Any, batch_size: int, seq: int) -> None:
    """Compile fast kernels for training steps of this shape, if they are in use."""
    if "trainer.batch_loss" in fast_pieces():
        importlib.import_module(f"{FAST}.trainer").prepare_model(model, batch_size, seq)


def is_faster_one_by_one(model: Any, n_texts: int) -> bool:
    """Whether greedy texts take less time one after the other than as a batch: with CPU kernels."""
    if "generate.generate" not in fast_pieces():
        return False
    return importlib.import_module(f"{FAST}.generate").is_faster_one_by_one(model, n_texts)


def kernel_cache() -> str:
    """The folder of compiled CPU kernels; "" if none is writable."""
    return os.environ.get("NUMBA_CACHE_DIR") or importlib.import_module(f"{FAST}.kernel_cache").folder()


def current(piece: str) -> Any:
    """The version in use of a piece such as `functional.softmax`."""
    home, name = piece.split(".")
    return getattr(_module(home), name)


def _module(home: str) -> types.ModuleType:
    name = HOMES_OUTSIDE_CORE.get(home, f"{CORE}.{home}")
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{home} needs {error.name}, which is not installed on this system") from error


# --------------------------------------------------------------------------------------------------
# Fast implementations


def _use_fast(log: Callable[[str], None]) -> None:
    numba_jit, kernel_cache = (importlib.import_module(f"{FAST}.{n}") for n in ("numba_jit", "kernel_cache"))
    is_cached = numba_jit.used_before() or kernel_cache.is_pending("tokenizer")
    if f"{CORE}.bpe" in sys.modules and not is_cached and not fast_pieces():
        log("compiling tokenizer kernels (about 10 s, cached; disable with --fast off)")
    own = set(user_pieces())
    for piece, fast in _fast_implementations():
        bypassed = own & _bypassed(piece)
        if bypassed - {piece}:
            names = ", ".join(sorted(bypassed))
            log(f"{piece.split('.')[1]}: reference code is used, a fast kernel would bypass your {names}")
        # user code, or a piece set by a test, has precedence
        elif current(piece).__module__ == _module(piece.split(".")[0]).__name__ or piece in fast_pieces():
            set_piece(piece, fast)


def _fast_implementations() -> Iterator[tuple[str, object]]:
    """Each piece that has a fast implementation, and that implementation; see `use`."""
    loaded = [home for home in WITH_FAST if f"{CORE}.{home}" in sys.modules]
    for home in WITH_FAST if "torch" in sys.modules or not loaded else loaded:
        path = f"{FAST}.{home}"
        # a fast class may inherit from its reference, so import it before pieces are replaced
        with contextlib.nullcontext() if path in sys.modules else reference_only():
            fast_module = importlib.import_module(path)
        for name, fast in sorted(vars(fast_module).items()):
            is_defined_there = getattr(fast, "__module__", None) == path and not name.startswith("_")
            if is_defined_there and hasattr(_module(home), name):
                yield f"{home}.{name}", fast


def _bypassed(piece: str) -> set[str]:
    """The pieces that the reference of `piece` calls, but not its fast implementation."""
    return _needs(piece) - STILL_CALLED.get(piece, set())


def _needs(piece: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The pieces that the reference of `piece` calls, directly or indirectly, and `piece` itself."""
    mentioned = user_code.mentioned(reference(piece))
    names = {name for name in mentioned if name in HOMES and f"{HOMES[name]}.{name}" not in seen | {piece}}
    needed = {piece}
    for name in names:
        needed |= _needs(f"{HOMES[name]}.{name}", seen | {piece} | needed)
    return needed
