"""A model and its optimizer in one file, without pickle: safetensors with JSON beside the tensors.

Tensors are named `model.*`, `optimizer.*` and `rng.*`. The file's metadata holds the rest as JSON, with a
SHA-256 over everything. A file takes its name only when it is complete and on disk.
"""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

SCHEMA = 1

Target = str | os.PathLike[str] | io.BufferedIOBase

# --------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, out: Target, **state: Any
) -> None:
    """Write model, optimizer, random state, `step` and whatever JSON `state` to a path or a binary file."""
    tensors, tied = _untie({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    saved = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    # cloned, since tensors that share some of their memory cannot be stored as they are
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    about = {
        "schema": SCHEMA,
        "step": step,
        "tied": tied,
        "optimizer": {"state": numbers, "param_groups": saved["param_groups"]},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **state,
    }
    described = json.dumps(about)
    content = safetensors.torch.save(
        tensors, {"llm_basics": described, "sha256": _digest(tensors, described)}
    )
    if isinstance(out, str | os.PathLike):
        _write_durably(Path(out), content)
    else:
        out.write(content)


def _untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that share all memory with another, and the names of both for each of these."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            kept[name] = tensor
        else:
            tied[name] = owner
    return kept, tied


def _write_durably(path: Path, content: bytes) -> None:
    """Write so that whatever happens, `path` holds all of the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name, too, must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot; the file itself is safe
                os.fsync(folder)
        finally:
            os.close(folder)


def _digest(tensors: dict[str, Tensor], described: str) -> str:
    """SHA-256 over the description, and over names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(src: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises ValueError unless all is as it was written."""
    content = Path(src).read_bytes() if isinstance(src, str | os.PathLike) else src.read()
    name = src if isinstance(src, str | os.PathLike) else "the checkpoint"
    try:
        tensors = safetensors.torch.load(content)
        header_bytes = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
        described, expected = metadata["llm_basics"], metadata["sha256"]
        about = json.loads(described)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{name} must be a checkpoint of llm_basics; {error}") from None
    if _digest(tensors, described) != expected:
        raise ValueError(f"{name} is damaged: it does not have the SHA-256 that was written with it")
    if about["schema"] != SCHEMA:
        raise ValueError(f"{name} must have schema {SCHEMA}, got {about['schema']}")
    return tensors, about


def load_checkpoint(
    src: Target, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, restore_rng: bool = False
) -> dict[str, Any]:
    """Restore `model`, and if given `optimizer`, and return the state with its `step`.

    Every weight must be there with the shape that the model has. Nothing is changed unless all fits.
    """
    tensors, about = read_checkpoint(src)
    weights = _section(tensors, "model.")
    weights |= {_strip(name): weights[_strip(owner)] for name, owner in about["tied"].items()}
    _check_shapes(model.state_dict(), weights)
    if optimizer is not None:  # first, since it may still object
        optimizer.load_state_dict(_optimizer_state(tensors, about["optimizer"], optimizer))
    model.load_state_dict(weights)
    if restore_rng:
        torch.set_rng_state(tensors["rng.torch"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    return about


def _optimizer_state(
    tensors: dict[str, Tensor], saved: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["state"].items()}
    for name, tensor in _section(tensors, "optimizer.").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = [dict(group) for group in saved["param_groups"]]
    for group, current in zip(groups, optimizer.param_groups, strict=False):
        # JSON has lists where Python had tuples
        group |= {k: tuple(v) for k, v in group.items() if isinstance(current.get(k), tuple)}
    return {"state": state, "param_groups": groups}


def _check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError that lists where `found` differs from `expected` in names and shapes."""
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is not in the model" for name in found.keys() - expected.keys()]
    differences += [
        f"{name} must be {tuple(expected[name].shape)}, got {tuple(found[name].shape)}"
        for name in expected.keys() & found.keys()
        if expected[name].shape != found[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError("the checkpoint is of another model: " + "; ".join(sorted(differences)[:5]) + more)


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _strip(name: str) -> str:
    return name.removeprefix("model.")
