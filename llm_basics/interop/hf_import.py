"""The program of `import_model`: a run directory from a model saved by Hugging Face transformers.

Reads config.json, the tokenizer and safetensors, in one file or several. Nothing is unpickled.
"""

import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from llm_basics.cli import commands, parse
from llm_basics.core import config, files, optim, vocabulary
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import prepare, tokenizer_formats
from llm_basics.interop import hf_config, hf_weights, peft_adapters
from llm_basics.runs import checkpoint, run_dir

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# --------------------------------------------------------------------------------------------------
# Reading


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or the files of an index."""
    if (folder / INDEX).is_file():
        with vocabulary.reading(f"{folder / INDEX} must map each tensor to a file"):
            file_of: dict[str, str] = files.read_json(folder / INDEX)["weight_map"]
            for file in file_of.values():
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise ValueError(f"a file must be a .safetensors file in the same folder, got {file!r}")
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(file_of.values())):
            tensors |= _read_safetensors(folder / file)
        return tensors
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise ValueError(
            f"{folder} must hold {WEIGHTS}, got "
            + (
                f"{others[0]}, a pickle, which can execute code when loaded; if you trust it, convert it "
                "with from_pretrained and save_pretrained of transformers"
                if others
                else "none"
            )
        )
    return _read_safetensors(folder / WEIGHTS)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file; {error}") from None


def read_model(folder: Path, adapters: str | None = None) -> tuple[models.TransformerLM, hf_config.Layout]:
    """Read the model in a folder of transformers, with PEFT's adapters in another; returns its layout too."""
    path = folder / "config.json"
    with vocabulary.reading(f"{path} must describe a model"):
        options = files.read_json(path)
        if not isinstance(options, dict):
            raise ValueError(f"got {type(options).__name__}")
    layout, shape = hf_config.read_options(options, origin=str(path))
    tensors = read_tensors(folder)
    if adapters is not None:
        tensors = peft_adapters.add(tensors, Path(adapters), _read_safetensors)
    weights = hf_weights.from_hf(layout, shape, tensors, origin=str(folder))
    model = models.TransformerLM(shape)
    model.load_state_dict(weights)
    return model, layout


def read_tokenizer(folder: Path, name: str | None, vocab_size: int) -> tokenizers.Tokenizer:
    """Load the tokenizer `name`, or that in the folder; its vocabulary size must be that of the model."""
    if name is None and not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"{folder} must hold tokenizer.json, or vocab.json and merges.txt; name another with --tokenizer"
        )
    tokenizer = tokenizer_formats.load(folder) if name is None else prepare.load_tokenizer(name)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer must have the vocabulary size of the model, {vocab_size:,}, got "
            f"{tokenizer.vocab_size:,} ({name or folder})"
        )
    if tokenizers.END_OF_TEXT not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer must have the special token {tokenizers.END_OF_TEXT}, which ends documents, "
            f"got {', '.join(tokenizer.special_tokens) or 'none'} ({name or folder})"
        )
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Writing


def write_run(
    model: models.TransformerLM, tokenizer: tokenizers.Tokenizer, folder: Path, out: Path, source: str
) -> None:
    """Write a run directory at step 0 to `folder`, which is renamed to `out` when complete."""
    options = dataclasses.asdict(
        config.Config(config=source, tokenizer=str(out / "tokenizer"), run_dir=str(out), model=model.config)
    )
    files.write(folder / "config.json", json.dumps(options, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer")
    checkpoint.save_checkpoint(
        model,
        optim.AdamW(model.parameters()),
        0,
        run_dir.checkpoint_path(folder, 0),
        config=options,
        tokenizer=tokenizer.fingerprint(),
        imported=source,
    )


def main(options: commands.ImportConfig) -> int:
    """Import a model. Returns the exit status."""
    with parse.exit_on_error():
        folder = Path(options.folder)
        if not folder.is_dir():
            raise ValueError(f"the model to import must be a folder, got {folder}")
        name = folder.resolve().name
        out = Path(options.out) if options.out is not None else run_dir.RUNS / name
        with run_dir.appearing(out) as temporary:
            model, layout = read_model(folder, options.adapters)
            tokenizer = read_tokenizer(folder, options.tokenizer, model.config.vocab_size)
            write_run(model, tokenizer, temporary, out, name)
        print(
            f"model       {model.n_parameters():,} parameters ({layout.architecture})\n"
            f"vocabulary  {tokenizer.vocab_size:,} tokens\n"
            f"run         {out}\n"
            f"generate    uv run python -m llm_basics.generate {out}"
        )
    return 0
