"""Checkpoints: model, optimizer and random state in one safetensors file, without pickle.

Tensors are named `model.*`, `optimizer.*` and `rng.*`. The file's metadata holds the rest as JSON, with a
SHA-256 over everything. Files are written atomically. A folder of checkpoints has no pointer files: the
latest and the best are found by reading it. Command: `uv run python -m llm_basics.checkpoint --help`.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from llm_basics.core import files as file_io
from llm_basics.core import vocabulary
from llm_basics.runs import process

SCHEMA = 2

# types of the common entries of the state
KINDS: dict[str, Any] = {"step": int, "tied": dict, "optimizer": dict, "random": dict, "origins": dict}
KINDS["val_loss"] = int | float | None

# entries of the state that `collect` adds
COLLECTED = {"schema", "step", "tied", "optimizer", "random"}

PATTERN = "step_*.safetensors"

Target = str | os.PathLike[str] | io.BufferedIOBase

# --------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, out: Target, **state: Any
) -> None:
    """Write model, optimizer, random state, `step` and JSON-serializable `state` to a path or binary file."""
    tensors, about = collect(model, optimizer, step, **state)
    weights, about["tied"] = _untie(_with_prefix(tensors, "model."))
    tensors = _separate(weights | {n: t for n, t in tensors.items() if not n.startswith("model.")})
    described = json.dumps(about)
    content = safetensors.torch.save(
        tensors, {"llm_basics": described, "sha256": _digest(tensors, described)}
    )
    if isinstance(out, str | os.PathLike):
        file_io.create_folder(Path(out).parent)
        file_io.write(out, content)
    else:
        out.write(content)


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, **state: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of a checkpoint: tensors, and a JSON-serializable state (`COLLECTED` and `state`)."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saved = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    random_tensors, random_numbers = process.all_random_states()
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "step": step,
        "tied": {},
        "optimizer": {"state": numbers, "param_groups": saved["param_groups"]},
        "random": random_numbers,
        **state,
    }
    return tensors | random_tensors, about


def _untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without duplicates of tied ones, and a map from each tied name to the stored name."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(memory, name) if tensor.numel() else name
        if owner == name:
            kept[name] = tensor
        else:
            tied[name] = owner
    return kept, tied


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, sorted by name; tensors that share storage are copied."""
    result, seen = {}, set()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owns_storage = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        result[name] = tensor.clone() if storage in seen or not owns_storage else tensor
        seen.add(storage)
    return result


def _digest(tensors: dict[str, Tensor], described: str) -> str:
    """SHA-256 over the JSON state and over names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(src: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises ValueError unless its SHA-256 matches."""
    name = src if isinstance(src, str | os.PathLike) else "the checkpoint"
    try:
        content = Path(src).read_bytes() if isinstance(src, str | os.PathLike) else src.read()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    try:
        tensors = safetensors.torch.load(content)
        header_bytes = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
        described, expected = metadata["llm_basics"], metadata["sha256"]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{name} must be an llm_basics checkpoint; {error}") from None
    if _digest(tensors, described) != expected:
        raise ValueError(f"{name} is damaged: its content does not match its SHA-256")
    return tensors, parse_about(described, name)


def parse_about(described: str, name: object) -> dict[str, Any]:
    """The state in the metadata of a file. Raises ValueError if it is invalid."""
    about = file_io.parse_json(described, name)
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        found = about.get("schema") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{name} must have schema {SCHEMA}, got {found!r:.60}")
    for key, kinds in KINDS.items():
        value = about.get(key, {} if key == "origins" else None)
        if not isinstance(value, kinds) or isinstance(value, bool) or (key == "step" and value < 0):
            raise ValueError(f"{name} must have a valid {key}, got {value!r:.60}")
    if not all(isinstance(origin, str) for origin in about.get("origins", {}).values()):
        raise ValueError(f"{name} must have a text as the origin of each piece")
    return about


def load_checkpoint(
    src: Target, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, restore_rng: bool = False
) -> dict[str, Any]:
    """Load a checkpoint into `model` and `optimizer`, and return the state with its `step`.

    Names and shapes must match the model's; otherwise raises ValueError and changes nothing.
    """
    tensors, about = read_checkpoint(src)
    name = src if isinstance(src, str | os.PathLike) else "the checkpoint"
    with vocabulary.reading(f"{name} must be an llm_basics checkpoint"):
        weights = _section(tensors, "model.")
        weights |= {_strip(name): weights[_strip(owner)] for name, owner in about["tied"].items()}
    check_shapes(model.state_dict(), weights, f"{name} does not fit the model")
    with vocabulary.reading(f"{name} must have the state of the optimizer and of random numbers"):
        if optimizer is not None:  # first, since it may raise
            load_optimizer(optimizer, tensors, about["optimizer"])
        if restore_rng:
            process.restore_all_random_states(tensors, about["random"])
    model.load_state_dict(weights)
    return about


def read_about(path: Path) -> dict[str, Any]:
    """The state from the file's header, without verification. Raises ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("it ends within its header")
            described = json.loads(file.read(size))["__metadata__"]["llm_basics"]
            if not isinstance(described, str):
                raise ValueError(f"its state must be text, got {type(described).__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be an llm_basics checkpoint; {error}") from None
    return parse_about(described, path)


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> None:
    """Load an optimizer's state from the tensors and the JSON state of a checkpoint."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["state"].items()}
    for name, tensor in _section(tensors, "optimizer.").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = [dict(group) for group in saved["param_groups"]]
    for group, current in zip(groups, optimizer.param_groups, strict=False):
        # JSON stores tuples as lists
        group |= {k: tuple(v) for k, v in group.items() if isinstance(current.get(k), tuple)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def weights_sha256(source: nn.Module | Path) -> str:
    """The SHA-256 of the weights of a model, or of those in a checkpoint."""
    if not isinstance(source, Path):
        tensors, _ = _untie({f"model.{name}": tensor for name, tensor in source.state_dict().items()})
        return _digest(_separate(tensors), "")
    tensors, _ = read_checkpoint(source)
    return _digest({name: tensor for name, tensor in tensors.items() if name.startswith("model.")}, "")


def check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], problem: str) -> None:
    """Raise ValueError, listing the differences, unless names and shapes of tensors match."""
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    differences += [
        f"{name} must be {tuple(expected[name].shape)}, got {tuple(found[name].shape)}"
        for name in expected.keys() & found.keys()
        if expected[name].shape != found[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(f"{problem}: " + "; ".join(sorted(differences)[:5]) + more)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _strip(name: str) -> str:
    return name.removeprefix("model.")


# --------------------------------------------------------------------------------------------------
# A folder of checkpoints


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint files of a folder, newest first, by name only."""
    return sorted(Path(folder).glob(PATTERN), reverse=True)


def verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises ValueError unless its SHA-256 and its file name match."""
    if path.is_symlink():
        raise ValueError(f"{path} must be a file, got a link")
    _, about = read_checkpoint(path)
    if path.name != f"step_{about['step']:08d}.safetensors":
        raise ValueError(f"{path} must be named after its step, got step {about['step']}")
    return about


def newest_valid(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, or None, and the errors of all newer ones."""
    rejected: list[str] = []
    for path in files(folder):
        try:
            verify(path)
            return path, rejected
        except ValueError as error:
            rejected.append(str(error))
    return None, rejected


def best(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the lowest validation loss, the oldest in a tie; None without validation losses."""
    losses = {}
    for path in reversed(files(folder)):
        with contextlib.suppress(ValueError):
            if (loss := read_about(path).get("val_loss")) is not None:
                losses[path] = loss
    return min(losses, key=lambda path: losses[path], default=None)


def find(folder: str | os.PathLike[str], which: str = "latest") -> Path:
    """The checkpoint named `latest`, `best`, or by its step number. Raises ValueError if there is none."""
    if which == "latest":
        found, rejected = newest_valid(folder)
        reasons = "".join(f"\n  {reason}" for reason in rejected)
    elif which == "best":
        found, reasons = best(folder), " with a validation loss"
    elif which.isdecimal():
        found, reasons = Path(folder) / f"step_{int(which):08d}.safetensors", f" of step {which}"
    else:
        raise ValueError(f"checkpoint must be latest, best or a step number, got {which}")
    if found is None or not found.exists():
        if any(Path(folder).glob("step_*.sharded")):
            reasons += "; make one of a sharded checkpoint: python -m llm_basics.checkpoint merge FOLDER"
        raise ValueError(f"{folder} must hold a checkpoint, got none{reasons}")
    return found


def prune(folder: str | os.PathLike[str], keep: int) -> list[Path]:
    """Delete all but the `keep` newest and the best. Returns the deleted paths.

    Counts from the newest valid checkpoint, so that at least one valid checkpoint remains.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    found = files(folder)
    valid, _ = newest_valid(folder)
    if valid is None:
        return []
    lowest = best(folder)
    older = found[found.index(valid) + keep :]
    unneeded = [path for path in older if path != lowest and not path.is_dir()]
    for path in unneeded:
        path.unlink(missing_ok=True)
    return unneeded


def delete_partial(folder: str | os.PathLike[str]) -> None:
    """Delete partial files of interrupted saves; no other process may be writing."""
    for path in Path(folder).glob(f"{PATTERN}.tmp-*"):
        path.unlink(missing_ok=True)
    for path in Path(folder).glob("step_*.incomplete"):
        delete_folder(path)


def delete_folder(path: Path) -> None:
    """Delete a folder and its contents, if it exists."""
    shutil.rmtree(path, ignore_errors=True)
