"""A training run as it stands: what `loop.fit` works on, and what a checkpoint holds of it."""

import contextlib
import dataclasses
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_basics import swap, user_code
from llm_basics.core import config, dataloader, device, evaluate, presets, trainer
from llm_basics.core import model as models
from llm_basics.data import documents, prepare, shards
from llm_basics.inference import engine
from llm_basics.runs import checkpoint, signals
from llm_basics.training import diagnostics

# settings that change nothing about what is learned
HARMLESS = {
    *("config", "run_dir", "resume", "init_from", "find_lr", "wandb", "data_dir"),
    *(f"train.{name}" for name in ("log_every", "eval_every", "eval_batches", "checkpoint_every")),
    *(f"train.{name}" for name in ("sample_every", "sample_tokens", "sample_prompt")),
    *(f"train.{name}" for name in ("keep_checkpoints", "on_save_error", "on_nonfinite")),
}

# random state and descriptions in a checkpoint
REST_BYTES = 32_000

# names in checkpoints of before -> names now
RENAMED = {"looked": "evaluated"}

# what a checkpoint of a training run says of it
KEPT = {"config", "data", "environment", "windows", "evaluated", "val_loss", "best_loss", "spikes"}


class SaveError(Exception):
    """A checkpoint could not be written; the ones before it are as they were."""


def check_parameters(model: nn.Module, shape: config.ModelConfig) -> None:
    """Raise ValueError if pieces of somebody's own made other parameters than the model's config asks."""
    if not swap.user_pieces():
        return
    with swap.reference_only():
        asked = models.TransformerLM(shape, device="meta").state_dict()
    made = model.state_dict()
    differences = [f"{name} is missing" for name in asked.keys() - made.keys()]
    differences += [f"{name} is too many" for name in made.keys() - asked.keys()]
    differences += [
        f"{name} is {tuple(made[name].shape)}, must be {tuple(tensor.shape)}"
        for name, tensor in asked.items()
        if name in made and made[name].shape != tensor.shape
    ]
    if differences:
        told = "; ".join(sorted(differences)[:3]) + (" ..." if len(differences) > 3 else "")
        raise ValueError(f"your pieces must make the parameters that the config asks for, but {told}")


class TrainingState:
    """Model, optimizer, data and how far they have come.

    Raises ValueError if the data cannot be trained on: too short, or with ids that the model does not have.
    """

    def __init__(self, options: config.Config, prepared: prepare.Prepared) -> None:
        train, model = options.train, options.model
        self.options = options
        self.tokenizer = prepared.tokenizer
        self.device = device.choose(train.device)
        if options.deterministic:
            device.make_deterministic()
        for shard in (*prepared.train, prepared.val):
            shards.check_ids(shard)
        self.batches, self.held_out = self.read(prepared)
        self.token_bytes = evaluate.token_lengths(self.tokenizer, model.vocab_size).to(self.device)
        # not drawn from here; but a piece of somebody else's may
        random.seed(train.seed)
        np.random.seed(train.seed)
        torch.manual_seed(train.seed)
        self.model = models.TransformerLM(model).to(self.device)
        check_parameters(self.model, model)
        # batches of one shape; and what somebody else wrote may ask the GPU for a number, which no graph can
        can_be_graph = train.grad_accumulation_steps == 1 and isinstance(self.batches, dataloader.Batches)
        can_be_graph = can_be_graph and not swap.user_pieces()
        n_flops = model.flops_per_token * train.batch_size * model.context_length
        how = device.compile_mode(train.compile, self.device, n_flops, can_be_graph)
        self.is_compiled, self.is_graph = how != "off", how == "graphs"
        if self.is_compiled:
            # of a model of somebody's own only the whole is known
            part = "forward" if "model.TransformerLM" in swap.user_pieces() else "hidden_states"
            mode = "reduce-overhead" if self.is_graph else None
            vars(self.model)[part] = torch.compile(getattr(self.model, part), dynamic=False, mode=mode)
        self.optimizer = trainer.make_optimizer(self.model, train)
        self.prepared_in = prepared.folder.name
        self.step = 0
        # windows of text that were trained on: with the seed, the position in the data
        self.windows = 0
        # whether evaluation and sample that are due after `step` were made
        self.evaluated = True
        # of these weights, and the lowest so far; None where not measured
        self.val_loss: float | None = None
        self.best_loss: float | None = None
        # step and validation loss of the last checkpoint
        self.saved: tuple[int, float | None] | None = None
        self.spikes = diagnostics.SpikeDetector()

    def read(self, prepared: prepare.Prepared) -> tuple[dataloader.BatchSource, np.ndarray]:
        """What is trained on, and the tokens that are held out."""
        train, length = self.options.train, self.options.model.context_length
        texts = [shard.tokens for shard in prepared.train]
        dataloader.check_length(max(map(len, texts), default=0), length, "the training text")
        dataloader.check_length(len(prepared.val.tokens), length, "the held-out text")
        batches = dataloader.Batches(texts, train.batch_size, length, train.seed, self.device, train.stride)
        return batches, prepared.val.tokens

    def uncompile(self) -> None:
        """Run the model as it is written."""
        for part in ("forward", "hidden_states"):
            vars(self.model).pop(part, None)
        self.is_compiled = self.is_graph = False

    def _as_written(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no compiled code runs, which is for batches of one shape."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext()

    def next_batches(self) -> list[dataloader.Batch]:
        """The batches whose gradients make up the next step."""
        train = self.options.train
        firsts = range(self.windows, self.windows + self.windows_per_step, train.batch_size)
        return [self.batches.starting_at(first) for first in firsts]

    def advance(self) -> None:
        """Count a step that was made."""
        self.step, self.windows = self.step + 1, self.windows + self.windows_per_step
        self.evaluated, self.val_loss = False, None

    def is_best(self, val_loss: float) -> bool:
        """Note the validation loss of the weights as they are: is none of those before as low?"""
        if not math.isfinite(val_loss):
            return False
        self.val_loss = val_loss
        if self.best_loss is not None and val_loss >= self.best_loss:
            return False
        self.best_loss = val_loss
        return True

    @property
    def windows_per_step(self) -> int:
        return self.options.train.batch_size * self.options.train.grad_accumulation_steps

    def evaluate(self, max_batches: int) -> dict[str, float]:
        """Loss and its relatives on what is held out. A request to stop is answered between batches."""
        batches = signals.polled(self.held_out_batches(max_batches))
        with device.precision(self.device, self.options.train.dtype), self._as_written():
            return evaluate.evaluate(self.model, batches, self.token_bytes)

    def held_out_batches(self, max_batches: int) -> Iterator[dataloader.Batch]:
        """What is held out, or so much of it, evenly spaced."""
        size, length = self.options.train.batch_size, self.options.model.context_length
        return dataloader.sequential_batches(self.held_out, size, length, max_batches, self.device)

    def sample(self) -> tuple[str, str]:
        """A prompt, and how the model continues it. A request to stop is answered between tokens."""
        train = self.options.train
        prompt = train.sample_prompt
        if prompt is None:
            prompt = opening_line(self.tokenizer.decode(self.held_out[:5000].tolist()))
        pieces = engine.complete(
            self.model, self.tokenizer, prompt, train.sample_tokens, temperature=0.8, seed=train.seed
        )
        with self._as_written():
            return prompt, "".join(signals.polled(pieces))

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything that going on from here needs. Raises SaveError if that fails."""
        try:
            checkpoint.save_checkpoint(
                self.model,
                self.optimizer,
                self.step,
                path,
                config=dataclasses.asdict(self.options),
                data=self.prepared_in,
                tokenizer=self.tokenizer.fingerprint(),
                origins=swap.origins(),
                environment=device.describe(self.device),
                windows=self.windows,
                tokens=self.windows * self.options.model.context_length,
                evaluated=self.evaluated,
                val_loss=self.val_loss,
                best_loss=self.best_loss,
                spikes=self.spikes.state(),
            )
            self.saved = self.step, self.val_loss
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {self.step} could not be written to {path} ({error.strerror}): "
                f"it needs about {self.checkpoint_bytes():,} bytes, {free_bytes(path.parent):,} are free"
            ) from None

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the weights as they are."""
        return self.saved is not None and self.saved[0] == self.step

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: the weights, what the optimizer keeps of each, and the rest."""
        total = REST_BYTES
        for group in self.optimizer.param_groups:
            n_means = 1 if "momentum" in group else 2
            total += (1 + n_means) * sum(p.numel() * p.element_size() for p in group["params"])
        return total

    def resume(self, path: Path) -> list[str]:
        """Go on from a checkpoint. Returns what is different now, and may change the last bit of the result.

        Raises ValueError if the checkpoint is damaged, or of another model or other data.
        """
        about = {RENAMED.get(name, name): value for name, value in checkpoint.verify(path).items()}
        if missing := KEPT - about.keys():
            raise ValueError(
                f"{path} must be of a training run, but does not say {', '.join(sorted(missing))}"
            )
        # what a checkpoint of before an option does not say has the option's default
        saved = presets.update(config.Config(), about["config"], origin=str(path))
        now, then = dataclasses.asdict(self.options), dataclasses.asdict(saved)
        differences = _differences(now["model"], then["model"])
        if differences:
            raise ValueError(f"{path} is of another model: {'; '.join(differences)}")
        if (optimizer := then["train"]["optimizer"]) != self.options.train.optimizer:
            raise ValueError(f"{path} was trained by {optimizer}, now it is {self.options.train.optimizer}")
        if about["data"] != self.prepared_in:
            raise ValueError(f"{path} was trained on {about['data']}, now the data is {self.prepared_in}")
        checkpoint.load_checkpoint(path, self.model, self.optimizer, restore_rng=True)
        self.step, self.windows = about["step"], about["windows"]
        self.evaluated = about["evaluated"]
        self.val_loss, self.best_loss = about["val_loss"], about["best_loss"]
        self.saved = self.step, self.val_loss
        self.spikes.load(about["spikes"])
        settings = _differences(presets.flat(now), presets.flat(then))
        settings = [line for line in settings if line.split(" ")[0] not in HARMLESS]
        if self.is_compiled and not self.options.deterministic and torch.get_num_threads() > 1:
            settings.append(
                "each run: compiled code on several threads adds up in any order (see --deterministic)"
            )
        origins = about.get("origins", {})
        before = {swap.piece(k): origin for k, origin in origins.items() if user_code.is_of_file(origin)}
        now_used = dict.fromkeys(before, "the reference's") | swap.user_pieces()
        settings += [
            f"{piece} was {before.get(piece, 'the reference')}, now {origin}"
            for piece, origin in now_used.items()
            if not user_code.same_code(origin, before.get(piece, ""))
        ]
        return settings + _differences(device.describe(self.device), about["environment"])


def free_bytes(folder: Path) -> int:
    """How much more the disk of `folder` can hold."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(there).free


def opening_line(text: str) -> str:
    """The first line that ends with a colon, and so asks for more, in code as in a play; else the first line.

    >>> opening_line("Act I.\\nROMEO:\\nIs the day so young?")
    'ROMEO:'
    """
    lines = [line for line in text.split(documents.DOCUMENT_SEPARATOR)[0].splitlines() if line.strip()]
    return next((line for line in lines if line.endswith(":")), lines[0] if lines else "")


def _differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What has another value `now`."""
    return [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v]
