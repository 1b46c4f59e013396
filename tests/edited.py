"""Files as a person, or a bad disk, may have left them: one change to a valid file, chosen at random."""

import copy
import hashlib
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

HUGE = 10**30

# values of every type, small and large, valid and not
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**40,
        HUGE,
        -HUGE,
        10**400,
        0.5,
        -0.5,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *("", "text", "3", "\x00\x1b[31m\u202e", "\ud800", "/", "x" * 10_000),
    *([], [[]], [None], ["a", 1], [HUGE] * 3, {}, {"a": 1}, {"": None}, {"step": []}),
]


def edit(path: Path, choose: random.Random) -> str:
    """Change a file; returns what was done."""
    content = path.read_bytes()
    if choose.random() < 0.15 or not content:
        return _cut(path, content, choose)
    kind = path.suffix
    if kind == ".safetensors":
        return _edit_safetensors(path, content, choose)
    if kind == ".jsonl":
        return _edit_lines(path, content.decode(), choose, is_json=True)
    if kind == ".json":
        value, done = changed(json.loads(content), choose)
        path.write_text(as_json(value), encoding="utf-8")
        return done
    if kind == ".yaml":
        value, done = changed(yaml.safe_load(content), choose)
        path.write_text(yaml.dump(value))
        return done
    return _edit_lines(path, content.decode(), choose, is_json=False)


def as_json(value: Any) -> str:
    """JSON as a person writes it, with escapes where only these express a text: a lone surrogate."""
    plain = json.dumps(value, ensure_ascii=False)
    try:
        plain.encode()
        return plain
    except UnicodeEncodeError:
        return json.dumps(value)


def changed(value: Any, choose: random.Random) -> tuple[Any, str]:
    """A copy of a JSON value with one change, and what it is."""
    value = copy.deepcopy(value)
    paths = list(_paths(value))
    if not paths or choose.random() < 0.1:
        new = choose.choice(VALUES)
        return new, f"all of it: {_short(new)}"
    parents, key = choose.choice(paths)
    parent = value
    for each in parents:
        parent = parent[each]
    name = "/".join(map(str, [*parents, key]))
    how = choose.choice(("replaced", "replaced", "replaced", "missing", "doubled", "renamed"))
    if how == "missing":
        del parent[key]
        return value, f"{name} missing"
    if how == "renamed" and isinstance(parent, dict):
        parent[choose.choice(("", "unknown", f"{key}s"))] = parent.pop(key)
        return value, f"{name} renamed"
    if how == "doubled":
        old = parent[key]
        if isinstance(parent, list):
            parent.insert(key, old)
        else:
            parent[key] = [old, old] if not isinstance(old, list | str) else old + old
        return value, f"{name} doubled"
    parent[key] = choose.choice(VALUES)
    return value, f"{name} = {_short(parent[key])}"


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Any:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield above, key
        yield from _paths(value[key], (*above, key))


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else repr(value)[:37] + "..."


def _cut(path: Path, content: bytes, choose: random.Random) -> str:
    size = choose.choice((0, len(content) // 2, max(0, len(content) - 2), choose.randint(0, len(content))))
    path.write_bytes(content[:size])
    return f"cut to {size} bytes"


def _edit_lines(path: Path, content: str, choose: random.Random, is_json: bool) -> str:
    lines = content.split("\n")
    number = choose.randrange(max(1, len(lines) - 1))
    if is_json and choose.random() < 0.7:
        value, done = changed(json.loads(lines[number]), choose)
        lines[number] = as_json(value)
    elif choose.random() < 0.5:
        others = ("", "text", "{}", "[]", "a b c", "\x00", "nan", "\u00e9 \u4e2d")
        lines[number] = choose.choice((*others, lines[number] * 2))
        done = f"= {_short(lines[number])}"
    elif choose.random() < 0.5:
        lines.insert(number, lines[number])
        done = "doubled"
    else:
        del lines[number]
        done = "missing"
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"line {number + 1}: {done}"


# --------------------------------------------------------------------------------------------------
# safetensors


def _edit_safetensors(path: Path, content: bytes, choose: random.Random) -> str:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.get("__metadata__", {})
    is_checkpoint = "llm_basics" in metadata
    how = choose.choice(("header", "values", "shape", "tensors", *(["state"] * 3 if is_checkpoint else [])))
    if how == "header":
        header, done = changed(header, choose)
        encoded = as_json(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        return f"header {done}"
    tensors = safetensors.torch.load(content)
    about = json.loads(metadata["llm_basics"]) if is_checkpoint else {}
    name = choose.choice(sorted(tensors))
    done = how
    if how == "state":
        about, done = changed(about, choose)
    elif how == "values":
        value = choose.choice((math.nan, math.inf, -1e30, 3e38, 0.0))
        if tensors[name].is_floating_point():
            tensors[name] = torch.full_like(tensors[name], value)
        done = f"{name} = {value}"
    elif how == "shape":
        old = tensors[name]
        others = [old[..., None], old.to(torch.float16), old.long()]
        others += [torch.cat([old, old]), old[:0], old.reshape(-1)] if old.dim() else []
        new = tensors[name] = choose.choice(others).contiguous()
        done = f"{name} {old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)}"
    elif choose.random() < 0.5:
        del tensors[name]
        done = f"{name} missing"
    else:
        tensors[f"{name}.more"] = tensors[name].clone()
        done = f"{name} doubled"
    if is_checkpoint:
        # as a program would have written it, or with the hash of before
        described = as_json(about)
        digest = hashed(tensors, described) if choose.random() < 0.7 else metadata["sha256"]
        metadata = {"llm_basics": described, "sha256": digest}
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return done


def hashed(tensors: dict[str, torch.Tensor], described: str) -> str:
    """The hash of a checkpoint."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy()).data)
    return digest.hexdigest()
