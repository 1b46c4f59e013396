"""The program of `export`: a trained model in the format of Hugging Face transformers.

Writes model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json and a
model card, README.md. transformers itself is not needed.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml

from llm_basics import user_code
from llm_basics.cli import commands, parse
from llm_basics.core import config, files, presets
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template, tokenizer_formats
from llm_basics.inference import engine
from llm_basics.interop import hf_config, hf_weights, peft_adapters
from llm_basics.runs import checkpoint, run_dir

EXPORTS = Path("exports")

# `chat_template.render` as a Jinja template; unlike there, special tokens in a message are parsed
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role must be system, user or assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# --------------------------------------------------------------------------------------------------
# The files


def export(
    model: models.TransformerLM, tokenizer: tokenizers.Tokenizer, folder: Path, card: str
) -> hf_config.Layout:
    """Write a model and its tokenizer to an existing folder; returns the layout."""
    shape = model.config
    layout = hf_config.find(shape)
    if tokenizer.vocab_size != shape.vocab_size:
        raise ValueError(
            f"model and tokenizer must have the same vocabulary size, got {shape.vocab_size} and "
            f"{tokenizer.vocab_size}"
        )
    end = tokenizer.end_of_text_id
    ids = {"bos_token_id": end, "eos_token_id": end}
    ends = [end, tokenizer.special_id(chat_template.END)] if chat_template.is_chat(tokenizer) else end
    tensors = hf_weights.to_hf(layout, shape, model.state_dict())
    files.write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    # torch_dtype: the name before transformers 5
    options = hf_config.write_options(layout, shape) | ids | {"dtype": "float32", "torch_dtype": "float32"}
    _write_json(folder / "config.json", options)
    _write_json(folder / "generation_config.json", ids | {"eos_token_id": ends, "pad_token_id": end})
    tokenizer_formats.write_tokenizer_json(tokenizer.to_vocabulary(), folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", tokenizer_options(tokenizer, shape.context_length))
    files.write(folder / "README.md", card)
    return layout


def write_adapters(
    path: Path,
    options: config.Config,
    tokenizer: tokenizers.Tokenizer,
    folder: Path,
    out: Path,
    card: str,
) -> None:
    """Write the adapters of a checkpoint for PEFT to `folder`, which becomes `out`, and the base to base/.

    The base includes the trained rows of new tokens, which are not low-rank products.
    """
    if options.lora.rank is None:
        raise ValueError(f"--adapters needs a run with --lora.rank, got {path}; export it without")
    model = engine.load_adapted(path, options)
    peft_adapters.write(folder, *peft_adapters.to_peft(model, options.lora, str(out / "base")))
    files.create_folder(folder / "base")
    export(peft_adapters.without_adapters(model), tokenizer, folder / "base", card)


def tokenizer_options(tokenizer: tokenizers.Tokenizer, context_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizers.END_OF_TEXT,
        "eos_token": tokenizers.END_OF_TEXT,
    }
    return options | ({"chat_template": CHAT_TEMPLATE} if chat_template.is_chat(tokenizer) else {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------
# The model card


def model_card(
    name: str,
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    options: config.Config,
    about: dict[str, Any],
    folder: Path,
) -> str:
    """The model card in Markdown: architecture, training, and how to load the model."""
    rows = {
        "architecture": f"{hf_config.find(model.config).architecture} of transformers",
        "parameters": f"{model.n_parameters():,}",
        "context": f"{model.config.context_length:,} tokens",
        "vocabulary": f"{model.config.vocab_size:,} tokens, byte-level BPE",
        **_history(options, about, folder),
    }
    shown = {"model": dataclasses.asdict(options.model)}
    if "imported" not in about:
        shown["train"] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options.train).items()}
    return CARD.format(
        name=name,
        kind="replies to messages" if chat_template.is_chat(tokenizer) else "continues text",
        table="\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        usage=CHAT_USAGE if chat_template.is_chat(tokenizer) else TEXT_USAGE,
        options=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip(),
    )


TEXT_USAGE = 'inputs = tokenizer("Once", return_tensors="pt")'

CHAT_USAGE = """chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- llm_basics
---

# {name}

A language model that {kind}, trained with llm_basics, a language model from scratch.

{table}

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
{usage}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

## Options

```yaml
{options}
```
"""


def _history(options: config.Config, about: dict[str, Any], folder: Path) -> dict[str, str]:
    """Rows of the model card about the training up to a checkpoint, without local paths."""
    if "imported" in about:
        return {"imported from": about["imported"]}
    step = about["step"]
    rows = {"trained on": Path(options.data).name or "text", "steps": f"{step:,}"}
    if "tokens" in about:
        rows["tokens"] = f"{about['tokens']:,}"
    measured = [entry for entry in run_dir.read_metrics(folder) if entry["step"] <= step]
    losses = [entry for entry in measured if entry.get("train_loss") is not None]
    evaluations = [entry for entry in measured if entry.get("val_loss") is not None]
    if losses:
        rows["training loss"] = f"{losses[-1]['train_loss']:.4f} at step {losses[-1]['step']:,}"
    if evaluations:
        last = evaluations[-1]
        rows["validation loss"] = f"{last['val_loss']:.4f} nats per token after step {last['step']:,}"
        for key, words in (("perplexity", "{:.2f}"), ("bits_per_byte", "{:.4f}"), ("accuracy", "{:.1%}")):
            if last.get(key) is not None:
                rows[key.replace("_", " ")] = words.format(last[key])
    return rows


# --------------------------------------------------------------------------------------------------


def main(options: commands.ExportConfig) -> int:
    """Export a model. Returns the exit status."""
    with parse.exit_on_error():
        folder = run_dir.resolve(options.run_dir)
        name = folder.resolve().name
        out = Path(options.out) if options.out is not None else EXPORTS / name
        path = checkpoint.find(folder / run_dir.CHECKPOINTS, options.checkpoint)
        about = checkpoint.read_about(path)
        model, tokenizer = engine.load_run(folder, which=str(about["step"]))
        origin = f"{folder}/config.json"
        trained = presets.update(config.Config(), run_dir.read_config(folder), origin=origin)
        origins = about.get("origins", {})
        pieces = ", ".join(piece for piece, source in origins.items() if user_code.is_of_file(source))
        if pieces:
            print(f"warning: trained with your {pieces}; transformers uses its own code", file=sys.stderr)
        with run_dir.appearing(out) as temporary:
            card = model_card(name, model, tokenizer, trained, about, folder)
            if options.adapters:
                write_adapters(path, trained, tokenizer, temporary, out, card)
            else:
                export(model, tokenizer, temporary, card)
        loader = "peft.AutoPeftModelForCausalLM" if options.adapters else "transformers.AutoModelForCausalLM"
        print(
            f"model     {model.n_parameters():,} parameters after step {about['step']:,}\n"
            f"layout    {hf_config.find(model.config).architecture}\n"
            f"written   {out}\n"
            f'load      {loader}.from_pretrained("{out}")'
        )
    return 0
