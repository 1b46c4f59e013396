"""Loss and gradients of a batch by the CPU training kernels: data parallelism over threads.

Each thread has its own sequences and gradients, which are summed once a step. A thread runs a few sequences
at a time forward and backward, so that activations stay in its core's cache.
"""

import functools
import sys
import weakref

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from llm_basics.core import config, dataloader, optim
from llm_basics.core import model as models
from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import amx, interpreter, matmul, muon, tape, threads, weights

# tokens of one forward and backward pass, unless a sequence is longer
TOKENS = 128

# widths of float32 (torch is faster at 384) and bfloat16 (as fast at 768; not measured beyond): MKL uses the
# caches better. The sum of all threads' gradients costs the same for any number of tokens
WIDEST, MOST_WEIGHTS_PER_TOKEN = (320, 768), 10_000

# float32 numbers per vector (AVX); narrower ones were not measured
LEAST_VECTOR = 8

# gradients of all threads together: 1 GB
MOST_GRADIENTS = 1 << 28

# by model, as long as the model exists
_LEARNERS: weakref.WeakKeyDictionary[nn.Module, "Learner"] = weakref.WeakKeyDictionary()


def learner_for(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> "Learner | None":
    """The `Learner` of a model for this batch; None if the kernels do not support it or torch is faster."""
    if not isinstance(model, models.TransformerLM) or unsupported(model, inputs):
        return None
    has_data = tape.has_data(inputs)
    if has_data and not are_known(model.config, inputs, targets):
        return None
    learner, n_threads = _LEARNERS.get(model), torch.get_num_threads()
    if learner is None or not learner.fits(model, n_threads, is_bfloat16()):
        if has_data:
            log_if_compiling()
        learner = _LEARNERS[model] = Learner(model, n_threads, is_bfloat16())
    return learner


def is_bfloat16() -> bool:
    """Whether the kernels multiply in bfloat16: within autocast, on a processor with AMX."""
    is_asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return is_asked and amx.is_available()


@functools.cache
def log_if_compiling() -> None:
    """Print that the first step waits for the compiler."""
    if not numba_jit.used_before("interpreter"):
        print("compiling CPU training kernels (about 10 s, cached; disable with --fast off)", file=sys.stderr)


def unsupported(model: models.TransformerLM, inputs: Int[Tensor, "batch seq"]) -> str:
    """Why the kernels do not support a model and batch, or torch is faster; "" if they are used."""
    c, n_threads = model.config, torch.get_num_threads()
    is_known_kind = type(inputs).__name__ in ("Tensor", "FakeTensor")
    if not is_known_kind or {inputs.device.type, model.lm_head.weight.device.type} != {"cpu"}:
        return "model and tokens must be on the CPU"
    if matmul.VECTOR < LEAST_VECTOR:
        return "the processor has no vectors of 8 floats (AVX2)"
    if reason := weights.supports(model, is_bfloat16()):
        return reason
    if "hidden_states" in vars(model):
        return "the model is compiled"
    if c.norm_placement != "pre":
        return "post-norm is not supported"
    if c.dropout and model.training:
        return f"dropout is {c.dropout}, and must be 0"
    for name, size in (("d_model / n_heads", c.d_head), ("d_ff", c.d_hidden)):
        if size % matmul.VECTOR:
            return f"{name} must be a multiple of {matmul.VECTOR}, got {size}"
    parameters = list(model.parameters())
    if not all(p.requires_grad and not hasattr(p, "to_local") for p in parameters):
        return "some weights are frozen or sharded"
    if len(inputs) < n_threads:
        return f"the batch has {len(inputs)} sequences for {n_threads} threads"
    n_parameters = sum(parameter.numel() for parameter in parameters)
    if c.d_model > WIDEST[is_bfloat16()] or n_parameters > MOST_WEIGHTS_PER_TOKEN * inputs.numel():
        return f"torch is faster for {n_parameters:,} weights, d_model {c.d_model}, {inputs.numel()} tokens"
    if n_threads * n_parameters > MOST_GRADIENTS:
        return f"gradients of {n_threads} threads would take too much memory"
    return ""


def are_known(
    shape: config.ModelConfig, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> bool:
    """Whether shapes and ids fit the model; the kernels do not check bounds."""
    if inputs.shape != targets.shape or not 0 < inputs.shape[1] <= shape.context_length:
        return False
    tokens, answers = inputs.numpy(), targets.numpy()
    counted = np.where(answers != dataloader.IGNORE_INDEX, answers, 0)
    limits = (tokens, shape.padded_vocab_size), (counted, shape.vocab_size)
    return all(ids.min() >= 0 and ids.max() < end for ids, end in limits)


class Learner:
    """Computes loss and gradients of one model on a number of threads.

    In bfloat16, the operands of projections are rounded; sums, and all else, are in float32.
    """

    def __init__(self, model: models.TransformerLM, n_threads: int, in_bfloat16: bool = False) -> None:
        self.parameters = list(model.parameters())
        self.addresses = [tape.address(parameter) for parameter in self.parameters]
        self.projections = {
            name: parameter
            for name, parameter in tape.named(model).items()
            if parameter.dim() == 2 and "embeddings" not in name
        }
        self.in_bfloat16 = in_bfloat16
        self.packed = {n: torch.empty(matmul.packed_size(*p.shape)) for n, p in self.projections.items()}
        self.paired = {
            name: torch.empty(p.numel() // 2)
            for name, p in self.projections.items()
            if in_bfloat16 and not any(size % amx.TILE for size in p.shape)
        }
        self.most = amx.padded(max(TOKENS, model.config.context_length))
        self.task = tape.task_of(model)
        self.programs = [tape.Program(model, self.packed, self.paired, self.most) for _ in range(n_threads)]

    def fits(self, model: models.TransformerLM, n_threads: int, in_bfloat16: bool) -> bool:
        """Whether the programs hold the addresses of the model's current weights."""
        self.parameters = list(model.parameters())
        addresses = [tape.address(parameter) for parameter in self.parameters]
        has_changed = addresses != self.addresses or in_bfloat16 != self.in_bfloat16
        return not has_changed and n_threads == len(self.programs)

    def learn(
        self, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
    ) -> tuple[float, list[Tensor]]:
        """The mean loss over targets that are not ignored, and its gradients in the order of the parameters.

        The loss of fake tensors, with which memory is estimated, is 0.
        """
        n_targets = max(1, int((targets != dataloader.IGNORE_INDEX).sum())) if tape.has_data(inputs) else 1
        loss = self._run(inputs, targets, z_loss, n_targets) / n_targets if tape.has_data(inputs) else 0.0
        first, *rows = [own.row for own in self.programs]
        total = first + rows[0] if rows else first.clone()
        for row in rows[1:]:
            total += row
        parts = total.split([parameter.numel() for parameter in self.parameters])
        shaped = zip(parts, self.parameters, strict=True)
        return loss, [part.view(parameter.shape) for part, parameter in shaped]

    def evaluate(
        self, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> tuple[float, int]:
        """The summed loss over targets that are not ignored, and how many of them have the highest logit."""
        loss = self._run(inputs, targets, 0.0, None)
        return loss, sum(int(own.n_correct) for own in self.programs)

    def _run(
        self,
        inputs: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        z_loss: float,
        n_targets: int | None,
    ) -> float:
        """The summed loss; leaves each thread's gradients of the mean over `n_targets` in its `row`.

        Without `n_targets`, only the forward pass, and the number of correct predictions in `n_correct`.
        """
        threads.parallel_map(self._pack, len(self.programs))
        tokens, answers = inputs.contiguous().numpy(), targets.contiguous().numpy()
        n_threads, seq = len(self.programs), inputs.shape[1]
        task = self.task._replace(seq=seq, z_loss=z_loss, share=1 / (n_targets or 1))
        ends = [i * len(tokens) // n_threads for i in range(n_threads + 1)]

        def work(number: int) -> float:
            own, texts = self.programs[number], slice(ends[number], ends[number + 1])
            # torch would start OpenMP threads for this thread, more than there are cores
            (own.n_correct if n_targets is None else own.row).numpy().fill(0)
            return interpreter.learn(
                own.evaluation if n_targets is None else own.table,
                tokens[texts].reshape(-1),
                answers[texts].reshape(-1),
                max(1, TOKENS // seq) * seq,
                task,
                own.common,
                own.of_heads,
            )

        return sum(threads.parallel_map(work, n_threads))

    def _pack(self, number: int) -> None:
        """Pack one thread's share of the projections."""
        for name in list(self.projections)[number :: len(self.programs)]:
            weight, packed = self.projections[name], self.packed[name].data_ptr()
            (d_out, d_in), address = weight.shape, weight.data_ptr()
            if name in self.paired:
                amx.pack(address, d_out, d_in, self.programs[number].common.left, packed)
                amx.pair_rows(address, d_out, d_in, self.paired[name].data_ptr())
            else:
                matmul.pack(address, d_in, d_out, d_in, packed)


def compile_kernels() -> None:
    """Run every kernel of a training step once."""
    shape = config.ModelConfig(256, 8, d_model=4 * matmul.VECTOR, n_layers=1, n_heads=4)
    model, tokens = models.TransformerLM(shape), torch.zeros(1, 8, dtype=torch.long)
    for in_bfloat16 in (False, True) if amx.is_available() else (False,):
        learner = Learner(model, 1, in_bfloat16)
        learner.learn(tokens, tokens, 0.0)
        learner.evaluate(tokens, tokens)
    nothing = np.empty((0, 3), np.int64)
    muon.update(nothing, 0, 0, 0.0, 0.0, 0.0, optim.NEWTON_SCHULZ, 0)
