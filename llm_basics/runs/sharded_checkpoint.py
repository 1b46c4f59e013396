"""Checkpoints of sharded models: a folder with one file for each process, written by torch's DCP.

    checkpoints/step_00000500.sharded/     about.json, .metadata, __0_0.distcp, __1_0.distcp, ...

`torch.distributed.checkpoint` (DCP) writes and reads only the shards of each process, for any number of
processes. The folder has a temporary name until it is complete. Its `.metadata` is a pickle: load only
folders that you trust. `merge` converts it to a checkpoint of one file, which `checkpoint` verifies; `split`
is the reverse.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_basics.core import config, files, presets, trainer
from llm_basics.core import model as models
from llm_basics.runs import checkpoint, process

SUFFIX = ".sharded"
PATTERN = f"step_*{SUFFIX}"
INCOMPLETE = ".incomplete"
ABOUT = "about.json"


class Writer:
    """Writes the sharded checkpoints of a run, one at a time; with `in_background` while training continues.

    All methods are collective. `group` is a CPU process group for this purpose alone; None: a single process.
    """

    def __init__(self, is_main: bool, group: Any, in_background: bool = False) -> None:
        self.is_main, self.group, self.in_background = is_main, group, in_background
        self.pending: tuple[Path, dict[str, Any], futures.Future[Any]] | None = None

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path, **state: Any
    ) -> None:
        """Write a checkpoint; in the background, only wait for the previous one.

        Raises WriteError on failure.
        """
        from torch.distributed import checkpoint as dcp

        self.finish()
        tensors, about = checkpoint.collect(model, optimizer, step, **state)
        partial = folder.with_name(folder.name + INCOMPLETE)
        with files.writing(folder):
            if self.is_main:
                checkpoint.delete_folder(partial)
                files.create_folder(partial)
            options: dict[str, Any] = {"checkpoint_id": partial, "process_group": self.group}
            if self.in_background:
                self.pending = folder, about, _future(dcp.async_save(tensors, **options))
                return
            with _single_process_allowed():
                _attempt(lambda: dcp.save(tensors, **options, no_dist=self.group is None))
        self._complete(folder, about)

    def finish(self) -> None:
        """Wait for the pending checkpoint. Raises WriteError if it failed."""
        if self.pending is not None:
            (folder, about, future), self.pending = self.pending, None
            with files.writing(folder):
                _attempt(future.result)
            self._complete(folder, about)

    def _complete(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the state, and rename the folder, which makes the checkpoint valid."""
        if self.is_main:
            partial = folder.with_name(folder.name + INCOMPLETE)
            sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            files.write(partial / ABOUT, json.dumps({**about, "files": sizes}))
            checkpoint.delete_folder(folder)
            with files.writing(folder):
                partial.rename(folder)


@contextlib.contextmanager
def _single_process_allowed() -> Iterator[None]:
    """Suppress DCP's warning about a missing process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _future(found: Any) -> futures.Future[Any]:
    """The future of a complete upload; newer versions of torch return two futures."""
    return getattr(found, "upload_completion", found)


def _attempt(write: Any) -> None:
    """Call `write`, and convert DCP's error of several processes to an OSError."""
    try:
        write()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the shards could not be written: {str(error).strip().splitlines()[-1]}") from error


# --------------------------------------------------------------------------------------------------
# Reading


def folders(home: Path) -> list[Path]:
    """The complete sharded checkpoints of a folder, newest first."""
    return sorted(home.glob(PATTERN), reverse=True)


def read_about(folder: Path) -> dict[str, Any]:
    """The state beside the tensors. Raises ValueError unless all files exist with the recorded size."""
    about = checkpoint.parse_about(files.read_text(folder / ABOUT), folder / ABOUT)
    for name, size in about.get("files", {}).items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{path} must have {size:,} bytes, got {'no file' if found is None else found}")
    if folder.name != f"step_{about['step']:08d}{SUFFIX}":
        raise ValueError(f"{folder} must be named after its step, got step {about['step']}")
    return about


def resumable(home: Path) -> list[Path]:
    """The checkpoints of both kinds in a folder, newest first."""
    return sorted([*checkpoint.files(home), *folders(home)], key=lambda path: path.stem, reverse=True)


def prune(home: Path, keep: int) -> None:
    """Delete all but the `keep` newest sharded checkpoints and the one with the lowest validation loss."""
    losses = {}
    for folder in folders(home):
        with contextlib.suppress(ValueError, OSError):
            losses[folder] = read_about(folder).get("val_loss")
    measured = {folder: loss for folder, loss in losses.items() if loss is not None}
    lowest = min(measured, key=lambda folder: measured[folder], default=None)
    for folder in list(losses)[keep:]:
        if folder != lowest:
            checkpoint.delete_folder(folder)


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Any = None,
    restore_rng: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer, sharded over any number of processes or unsharded.

    Returns the state beside the tensors. Raises ValueError if the folder does not match the model.
    """
    from torch.distributed import checkpoint as dcp

    about = read_about(folder)
    stored: dict[str, Any] = dict(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    found = {name: torch.empty(each.size, device="meta") for name, each in stored.items()}
    weights = {name: tensor for name, tensor in found.items() if name.startswith("model.")}
    checkpoint.check_shapes(expected, weights, f"{folder} does not fit the model")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = dict(expected)
    for name, tensor in found.items():
        if name.startswith("optimizer."):
            parameter = parameters[int(name.split(".")[1])]
            is_like = tensor.shape == parameter.shape
            tensors[name] = torch.zeros_like(parameter) if is_like else torch.zeros(tensor.shape)
        elif name.startswith("rng."):
            tensors[name] = torch.zeros(tensor.shape, dtype=stored[name].properties.dtype)
    with _single_process_allowed():
        dcp.load(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)
    checkpoint.load_optimizer(optimizer, tensors, about["optimizer"])
    if restore_rng:
        process.restore_all_random_states(tensors, about["random"])
    return about


# --------------------------------------------------------------------------------------------------
# Conversion


def _objects(about: dict[str, Any], origin: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer of the recorded options."""
    options = presets.update(config.Config(), about["config"], origin=str(origin))
    model = models.TransformerLM(options.model)
    return model, trainer.make_optimizer(model, options.train)


def _state(about: dict[str, Any]) -> dict[str, Any]:
    """The entries of the state that `checkpoint.collect` does not add."""
    return {name: value for name, value in about.items() if name not in checkpoint.COLLECTED | {"files"}}


def merge(folder: Path) -> Path:
    """Write the checkpoint of one file beside a sharded one. Returns its path."""
    about = read_about(folder)
    model, optimizer = _objects(about, folder)
    load(folder, model, optimizer, restore_rng=True)
    path = folder.with_suffix(".safetensors")
    checkpoint.save_checkpoint(model, optimizer, about["step"], path, **_state(about))
    return path


def split(path: Path) -> Path:
    """Write the sharded checkpoint beside one of one file. Returns its folder."""
    about = checkpoint.verify(path)
    model, optimizer = _objects(about, path)
    checkpoint.load_checkpoint(path, model, optimizer, restore_rng=True)
    folder = path.with_suffix(SUFFIX)
    Writer(is_main=True, group=None).save(model, optimizer, about["step"], folder, **_state(about))
    return folder
