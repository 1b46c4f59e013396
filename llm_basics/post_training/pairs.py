"""Preference pairs: two responses to a prompt, of which one is preferred, from a file or from a model.

{"prompt": "What is 2 plus 3?", "chosen": "5", "rejected": "6"}
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_basics.core import device, files
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template, jsonl, prepare
from llm_basics.inference import engine
from llm_basics.post_training import options as post_options
from llm_basics.post_training import rollouts
from llm_basics.runs import checkpoint, console, run_dir
from llm_basics.training import sft

FIELDS = ("prompt", "chosen", "rejected")

# number of responses sampled per batch
SAMPLED_AT_ONCE = 128


@dataclass(frozen=True)
class Pair:
    """A prompt up to `<|assistant|>`, and two responses with `<|end|>`, as ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def is_pairs(path: str) -> bool:
    """Whether a file's first record is a preference pair."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        first = next(jsonl.read(path, file), None)
    return first is not None and isinstance(first[1], dict) and "chosen" in first[1]


def read(path: str, tokenizer: tokenizers.Tokenizer) -> Iterator[Pair]:
    """The pairs of a file. Raises ValueError, with the line, for an invalid record."""
    end = tokenizer.special_id(chat_template.END)
    with open(path, "rb") as file:
        for position, record in jsonl.read(path, file):
            values = [record.get(name) if isinstance(record, dict) else None for name in FIELDS]
            if not all(isinstance(value, str) and value.strip() for value in values):
                raise ValueError(
                    f"{position} must be an object with the texts {', '.join(FIELDS)}, got "
                    f"{json.dumps(record):.80}"
                )
            prompt, chosen, rejected = map(str, values)
            if chosen == rejected:
                raise ValueError(f"{position} must have two different responses, got {chosen!r:.60} twice")
            yield Pair(
                chat_template.render_prompt(tokenizer, [chat_template.Message("user", prompt)]),
                [*tokenizer.encode_ordinary(chosen), end],
                [*tokenizer.encode_ordinary(rejected), end],
            )


# --------------------------------------------------------------------------------------------------
# From a model


def from_model(options: post_options.DpoConfig, prepared: prepare.Prepared) -> Path:
    """The file of pairs of responses of the initial model, sampled unless there is one.

    For some training prompts, `dpo.samples` responses are compared with the expected one. The chosen response
    equals it, or is the expected one if none does; the rejected one differs. A prompt with only correct
    responses yields no pair.
    """
    assert options.init_from is not None, "checked by sft.prepared"
    where = Path(options.init_from) / run_dir.CHECKPOINTS
    settings = [checkpoint.weights_sha256(checkpoint.find(where)), prepared.folder.name, options.train.seed]
    settings += [options.dpo.samples, options.dpo.prompts, options.dpo.max_new_tokens]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = Path(options.data_dir) / f"pairs-{digest}.jsonl"
    if path.exists():
        return path
    state = sft.SftState(options, prepared)
    limit = options.model.context_length - options.dpo.max_new_tokens
    cases = [state.test_case(row) for row in state.train_rows.rows]
    cases = [case for case in cases if len(case.ids) <= limit]
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(options.train.seed))
    chosen = [cases[index] for index in order[: options.dpo.prompts].tolist()]
    console.print_line(f"sampling {options.dpo.samples} responses to each of {len(chosen):,} prompts")
    found = list(_sample_pairs(options, chosen))
    if not found:
        raise ValueError(
            f"the model must have wrong responses to make pairs of, but all to {len(chosen):,} prompts are "
            "right; use harder prompts, or raise --dpo.samples"
        )
    console.print_line(f"{len(found):,} pairs in {path}")
    files.create_folder(path.parent)
    files.write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))
    return path


def _sample_pairs(options: post_options.DpoConfig, cases: Sequence[sft.TestCase]) -> Iterator[dict[str, Any]]:
    """A record for each case to which the initial model has a wrong response."""
    assert options.init_from is not None
    model, tokenizer = engine.load_run(options.init_from, device.choose(options.train.device))
    reward, n = rollouts.load_reward("exact"), options.dpo.samples
    at_once = max(SAMPLED_AT_ONCE // n, 1)
    for number, first in enumerate(range(0, len(cases), at_once)):
        some = [case for case in cases[first : first + at_once] for _ in range(n)]
        seeds = rollouts.seeds(options.train.seed, number, len(some))
        found = rollouts.sample(model, tokenizer, some, options.dpo.max_new_tokens, seeds, reward)
        for i in range(0, len(found), n):
            group = found[i : i + n]
            # training on a truncated response would teach the model to stop there
            wrong = [r.text for r in group if r.ended and not r.is_exact and r.text.strip()]
            right = [r.text for r in group if r.is_exact]
            if wrong:
                expected = group[0].case.expected.removesuffix(chat_template.END)
                yield dict(
                    zip(FIELDS, (group[0].case.question, (right or [expected])[0], wrong[0]), strict=True)
                )
