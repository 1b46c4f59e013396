"""The state of a training run, updated by `loop.fit` and stored in checkpoints."""

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from llm_basics import swap, user_code
from llm_basics.cli import nested
from llm_basics.core import config, dataloader, device, evaluate, files, presets, trainer, vocabulary
from llm_basics.core import model as models
from llm_basics.data import batch_source, prepare, shards
from llm_basics.inference import engine
from llm_basics.runs import checkpoint, process, sharded_checkpoint, signals, steering
from llm_basics.training import compilation, diagnostics, distributed, held_out, parallel, user_model

T = TypeVar("T")

# options that do not affect the weights
NO_EFFECT_ON_WEIGHTS = {
    *("config", "run_dir", "resume", "replay", "init_from", "find_lr", "wandb", "data_dir"),
    *(f"train.{name}" for name in ("log_every", "eval_every", "eval_batches", "checkpoint_every")),
    *(f"train.{name}" for name in ("sample_every", "sample_tokens", "sample_prompt")),
    *(f"train.{name}" for name in ("keep_checkpoints", "on_save_error", "on_nonfinite")),
}

# options outside of train whose change on a resume is recorded
RECORDED = {"fast", "deterministic"}

# size of the random state and the metadata in a checkpoint
METADATA_BYTES = 32_000

# metadata keys of older checkpoints -> current keys
RENAMED = {"looked": "evaluated", "windows": "sequences"}

# metadata that every checkpoint of a training run has
REQUIRED: dict[str, Any] = dict.fromkeys(("config", "environment", "spikes"), dict)
REQUIRED |= {"data": str, "sequences": int, "evaluated": bool}
REQUIRED |= dict.fromkeys(("val_loss", "best_loss"), int | float | None)


class TrainingState:
    """Model, optimizer, data and progress of a training run.

    Raises ValueError for data that is too short, or has token ids outside the vocabulary.
    """

    def __init__(self, options: config.Config, prepared: prepare.Prepared) -> None:
        train, model = options.train, options.model
        self.options = options
        self.tokenizer = prepared.tokenizer
        self.device = distributed.choose_device(train.device)
        if options.deterministic:
            process.make_deterministic()
        for shard in (*prepared.train, prepared.val):
            shards.check_ids(shard)
        self.batches, self.held_out = self.read(prepared)
        self.measured_on = {
            "text": held_out.digest(self.tokenizer, self.held_out, prepared.val.n_bytes),
            "tokenizer": self.tokenizer.fingerprint(),
        }
        self.token_bytes = evaluate.token_lengths(self.tokenizer, model.vocab_size).to(self.device)
        # this package uses torch's generator alone; user code may use the others
        random.seed(train.seed)
        np.random.seed(train.seed)
        torch.manual_seed(train.seed)
        # weights to be sharded need not fit on one GPU
        self.is_sharded = distributed.strategy(train) == "fsdp2"
        self.model = models.TransformerLM(model)
        self.model.to(torch.device("cpu") if self.is_sharded else self.device)
        # the module of training steps: the model, or its wrapper in a job of several processes
        self.replica: nn.Module = self.model
        user_model.check_parameters(self.model, model)
        # adapters of a LoRA run, which are trained and saved instead of the model's weights
        self.adapters: Any = None
        if options.lora.rank is not None:
            self.adapters = engine.adapt(self.model, options.lora, engine.base_of(options))
        of_one_shape = isinstance(self.batches, dataloader.Batches)
        mode = compilation.apply(self.model, options, self.device, of_one_shape, by_block=self.is_sharded)
        self.is_compiled, self.is_graph = mode != "off", mode == "graphs"
        self.optimizer = trainer.make_optimizer(self.model, train)
        self.prepared_in = prepared.folder.name
        self.step = 0
        # sequences trained on; with the seed this is the position in the data
        self.sequences = 0
        # whether the evaluation and the sample due after `step` are done
        self.evaluated = True
        # validation loss of the current weights, and the lowest so far; None: not measured
        self.val_loss: float | None = None
        self.best_loss: float | None = None
        # step and validation loss of the last checkpoint
        self.saved: tuple[int, float | None] | None = None
        self.saved_in: Path | None = None
        self.spikes = diagnostics.SpikeDetector()
        # metrics of the last step except its loss
        self.observed: dict[str, float] = {}
        # writer of sharded checkpoints, if any; the sharded checkpoint to resume from
        self.writer: sharded_checkpoint.Writer | None = None
        self.shards: Path | None = None
        # old and new values of options that changed on the resume
        self.changed: dict[str, list[Any]] = {}
        # whether the weights equal those of the replayed run at its last checkpoint; None: not compared
        self.is_same_as_replayed: bool | None = None

    def read(self, prepared: prepare.Prepared) -> tuple[batch_source.BatchSource, np.ndarray]:
        """The training batches, and the held-out tokens."""
        train, length = self.options.train, self.options.model.context_length
        texts = [shard.tokens for shard in prepared.train]
        dataloader.check_length(max(map(len, texts), default=0), length, "the training text")
        dataloader.check_length(len(prepared.val.tokens), length, "the held-out text")
        batches = dataloader.Batches(texts, train.batch_size, length, train.seed, self.device, train.stride)
        return batches, prepared.val.tokens

    def use_shards(self) -> None:
        """Load a sharded checkpoint to resume from; create the writer of sharded checkpoints if enabled."""
        group = distributed.saving_group()
        if self.shards is not None:
            sharded_checkpoint.load(self.shards, self.model, self.optimizer, group, restore_rng=True)
        if (mode := self.options.train.sharded_checkpoints) != "off":
            self.writer = sharded_checkpoint.Writer(distributed.is_main(), group, mode == "async")

    def uncompile(self) -> None:
        """Run the model uncompiled."""
        compilation.uncompile_model(self.model)
        self.is_compiled = self.is_graph = False

    def parallelize(self) -> None:
        """Distribute the model over the processes of the job, once its weights are loaded."""
        replica = parallel.parallelize(self.model, self.options.train, self.device)
        if replica is not None:
            self.replica = replica.module
            if self.is_sharded:
                before, self.optimizer = (
                    self.optimizer,
                    trainer.make_optimizer(self.model, self.options.train),
                )
                parallel.reshard_optimizer(before, self.optimizer)
                self.use_shards()
            distributed.seed(self.options.train.seed, self.step, self.device)

    def _eager(self) -> contextlib.AbstractContextManager[None]:
        """Disable compiled code within the context; it is specialized to the shape of training batches."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext()

    def next_batches(self) -> list[dataloader.Batch]:
        """The batches of the next step, over which gradients are accumulated."""
        train = self.options.train
        firsts = range(self.sequences, self.sequences + self.sequences_per_step, train.batch_size)
        return [distributed.rows(self.batches.starting_at(first)) for first in firsts]

    def train_step(
        self, batches: Sequence[dataloader.Batch], accept: Callable[[float], bool] | None = None
    ) -> trainer.StepResult:
        """One optimizer step on `batches`, see `trainer.train_step`."""
        return trainer.train_step(
            self.replica, self.optimizer, batches, self.step + 1, self.options.train, accept
        )

    def accumulate_gradients(self, batches: Sequence[dataloader.Batch]) -> Tensor:
        """Accumulate the gradients of the loss of `batches`, without a wrapper; returns this loss."""
        return trainer.accumulate_gradients(self.model, batches, self.options.train)

    def batch_loss(self, batch: dataloader.Batch) -> Tensor:
        """The loss of one batch, without a wrapper."""
        return trainer.batch_loss(self.model, *batch, self.options.train.z_loss)

    def advance(self) -> None:
        """Count one completed step."""
        self.step, self.sequences = self.step + 1, self.sequences + self.sequences_per_step
        self.evaluated, self.val_loss = False, None
        distributed.seed(self.options.train.seed, self.step, self.device)

    def is_best(self, val_loss: float) -> bool:
        """Record the validation loss of the current weights; True if it is the lowest so far."""
        if not math.isfinite(val_loss):
            return False
        self.val_loss = val_loss
        if self.best_loss is not None and val_loss >= self.best_loss:
            return False
        self.best_loss = val_loss
        return True

    @property
    def sequences_per_step(self) -> int:
        return self.options.train.batch_size * self.options.train.grad_accumulation_steps

    def evaluate(self, max_batches: int) -> dict[str, float]:
        """Loss, perplexity, accuracy and bits per byte on the held-out split. Polls signals."""
        batches = signals.polled(self.held_out_batches(max_batches))
        with device.precision(self.device, self.options.train.dtype), self._eager():
            model = self.replica if self.is_sharded else self.model
            return parallel.evaluate_rows(model, batches, self.token_bytes)

    def held_out_batches(self, max_batches: int) -> Iterator[dataloader.Batch]:
        """Batches of the held-out split, at most `max_batches`, evenly spaced."""
        size, length = self.options.train.batch_size, self.options.model.context_length
        return dataloader.sequential_batches(self.held_out, size, length, max_batches, self.device)

    def sample(self) -> tuple[str, str]:
        """A prompt and its continuation by the model. Polls signals."""
        train = self.options.train
        prompt = train.sample_prompt
        if prompt is None:
            prompt = held_out.opening_line(self.tokenizer.decode(self.held_out[:5000].tolist()))
        pieces = engine.complete(
            self.model, self.tokenizer, prompt, train.sample_tokens, temperature=0.8, seed=train.seed
        )
        with self._eager():
            return prompt, "".join(signals.polled(pieces))

    def on_main(self, function: Callable[[], T]) -> T | None:
        """Run `function` in the main process, with an unsharded, merged `self.model`."""
        used = self.model
        if self.is_sharded:
            self.model = parallel.whole_model(used, self.options.model, self.device)
        elif self.adapters is not None and distributed.is_main():
            self.model = self.adapters.merged()
        try:
            return distributed.on_main(function)
        finally:
            self.model = used

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from. Raises files.WriteError if that fails."""
        self.saved = None
        if self.writer is not None:
            path = path.with_suffix(sharded_checkpoint.SUFFIX)
            self.writer.save(self.model, self.optimizer, self.step, path, **self.about())
        else:
            saved = self.adapters or parallel.gathered(self.model), parallel.gathered(self.optimizer)
            distributed.on_main(lambda: checkpoint.save_checkpoint(*saved, self.step, path, **self.about()))
        self.saved, self.saved_in = (self.step, self.val_loss), path

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is written in the background. Raises files.WriteError if it failed."""
        if self.writer is not None:
            try:
                self.writer.finish()
            except files.WriteError:
                self.saved = None
                raise

    def about(self) -> dict[str, Any]:
        """The metadata of a checkpoint, except the step."""
        return {
            "config": dataclasses.asdict(self.options),
            "data": self.prepared_in,
            "tokenizer": self.tokenizer.fingerprint(),
            "origins": swap.origins(),
            "environment": process.describe(self.device) | distributed.describe(),
            "sequences": self.sequences,
            "tokens": self.sequences * self.options.model.context_length,
            "evaluated": self.evaluated,
            "val_loss": self.val_loss,
            "best_loss": self.best_loss,
            "spikes": self.spikes.state(),
        } | ({"base": self.adapters.base} if self.adapters else {})

    @property
    def is_saved(self) -> bool:
        """Whether the current weights are in a checkpoint."""
        return self.saved is not None and self.saved[0] == self.step

    def checkpoint_bytes(self) -> int:
        """Estimated size of a checkpoint: weights, optimizer state and metadata."""
        total = METADATA_BYTES
        for group in self.optimizer.param_groups:
            n_means = 1 if "momentum" in group else 2
            total += (1 + n_means) * sum(p.numel() * p.element_size() for p in group["params"])
        return total

    def resume(self, path: Path, changes: Sequence[steering.Change] = ()) -> list[str]:
        """Resume from a checkpoint. Returns the differences that may change the last bit of the result.

        Options in `changes` are set to their value at the checkpoint's step.

        Raises ValueError if the checkpoint is damaged, or of another model or other data.
        """
        read = sharded_checkpoint.read_about if path.is_dir() else checkpoint.verify
        metadata = {RENAMED.get(name, name): value for name, value in read(path).items()}
        missing = [key for key, kind in REQUIRED.items() if not isinstance(metadata.get(key, ...), kind)]
        if missing:
            raise ValueError(
                f"{path} must be a checkpoint of a training run, but lacks {', '.join(sorted(missing))}"
            )
        # options newer than the checkpoint are set to their defaults
        saved = presets.update(type(self.options)(), metadata["config"], origin=str(path))
        saved = steering.at_step(saved, changes, metadata["step"])
        self.options = steering.at_step(self.options, changes, metadata["step"])
        now, then = dataclasses.asdict(self.options), dataclasses.asdict(saved)
        differences = _differences(now["model"] | now["lora"], then["model"] | then["lora"])
        if differences:
            raise ValueError(f"{path} is of another model: {'; '.join(differences)}")
        if (optimizer := then["train"]["optimizer"]) != self.options.train.optimizer:
            raise ValueError(
                f"{path} was trained with {optimizer}, got --train.optimizer {self.options.train.optimizer}"
            )
        if metadata["data"] != self.prepared_in:
            raise ValueError(f"{path} was trained on {metadata['data']}, now the data is {self.prepared_in}")
        if path.is_dir() and self.is_sharded:
            self.shards = path  # `parallelize` loads the shard of each process
        elif path.is_dir():
            sharded_checkpoint.load(path, self.model, self.optimizer, restore_rng=True)
        else:
            checkpoint.load_checkpoint(path, self.adapters or self.model, self.optimizer, restore_rng=True)
        self.step, self.sequences = metadata["step"], metadata["sequences"]
        self.evaluated = metadata["evaluated"]
        self.val_loss, self.best_loss = metadata["val_loss"], metadata["best_loss"]
        self.saved = self.step, self.val_loss
        with vocabulary.reading(f"{path} must have the state of the spike detector"):
            self.spikes.load(metadata["spikes"])
        found = nested.differences(then, now)
        self.changed = {k: list(found[k]) for k in found if k.startswith("train.") or k in RECORDED}
        settings = _differences(nested.flat(now), nested.flat(then))
        settings = [line for line in settings if line.split(" ")[0] not in NO_EFFECT_ON_WEIGHTS]
        if self.is_compiled and not self.options.deterministic and torch.get_num_threads() > 1:
            settings.append(
                "the order of sums in compiled code on several threads varies by run (see --deterministic)"
            )
        origins = metadata.get("origins", {})
        before = {swap.piece(k): origin for k, origin in origins.items() if user_code.is_of_file(origin)}
        now_used = dict.fromkeys(before, "the reference") | swap.user_pieces()
        settings += [
            f"{piece} was {before.get(piece, 'the reference')}, now {origin}"
            for piece, origin in now_used.items()
            if not user_code.same_code(origin, before.get(piece, ""))
        ]
        environment = process.describe(self.device) | distributed.describe()
        return settings + _differences(environment, distributed.ALONE | metadata["environment"])


def _differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """The entries of `now` whose value differs from `then`, as text."""
    return [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v]
