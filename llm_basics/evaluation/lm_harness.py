"""Adapter for EleutherAI's lm-evaluation-harness, with the benchmarks reported in papers.

The harness has the tasks, prompts and metrics; `HarnessModel` computes log-likelihoods and texts. In Python:

    lm_eval.simple_evaluate(lm_harness.HarnessModel("runs/NAME"), tasks=["arc_easy"])
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval import tasks, utils
from lm_eval.api import model as harness
from lm_eval.api import registry

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import device as devices
from llm_basics.core import files
from llm_basics.evaluation import log_likelihood
from llm_basics.inference import engine
from llm_basics.runs import run_dir as run_dirs

# default for tasks without max_gen_toks
MAX_NEW_TOKENS = 256


@registry.register_model("llm_basics")
class HarnessModel(harness.TemplateLM):
    """The model of a run directory as a harness model. Documents begin and end with END_OF_TEXT."""

    def __init__(
        self,
        run_dir: str,
        checkpoint: str = "latest",
        device: str = "auto",
        batch_size: int = log_likelihood.BATCH_SIZE,
    ) -> None:
        super().__init__()
        self.model, self.own_tokenizer = engine.load_run(run_dir, devices.choose(device), checkpoint)
        self.batch_size = int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The id of END_OF_TEXT, which precedes each document."""
        return self.own_tokenizer.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; special tokens in it are ordinary text."""
        return self.own_tokenizer.encode_ordinary(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations encoded by the harness."""
        pairs = [(context or [self.eot_token_id], continuation) for _, context, continuation in requests]
        return log_likelihood.score_continuations(self.model, pairs, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts after END_OF_TEXT, in disjoint windows."""
        texts = [self.tok_encode(*request.args) for request in requests]
        return [self._log_probability(np.array([self.eot_token_id, *text])) for text in texts]

    def _log_probability(self, tokens: np.ndarray) -> float:
        scores = log_likelihood.score_text(self.model, tokens, batch_size=self.batch_size)
        return sum(part.log_probabilities.sum().item() for part in scores)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to the first of the strings `until`."""
        return [self._generate_text(*request.args) for request in requests]

    def _generate_text(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        pieces = engine.complete(
            self.model,
            self.own_tokenizer,
            context,
            settings.get("max_gen_toks", MAX_NEW_TOKENS),
            temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
            top_k=settings.get("top_k") if settings.get("do_sample") else None,
            top_p=settings.get("top_p") if settings.get("do_sample") else None,
        )
        return _up_to(pieces, [until] if isinstance(until, str) else until)


def _up_to(pieces: Iterator[str], stops: Sequence[str]) -> str:
    """The text of `pieces` up to the first of `stops`.

    >>> _up_to(iter(["4\\n", "\\nQ: wh", "y"]), ["\\n\\n", "Q:"])
    '4'
    """
    text = ""
    for piece in pieces:
        text += piece
        if ends := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(ends)]
    return text


def main(options: commands.HarnessConfig) -> int:
    """Run tasks of the harness and print its table. Returns the exit status."""
    with swap.restored(), parse.exit_on_error():
        if not options.tasks:
            raise ValueError("--tasks must name at least one task, got none")
        if options.out is not None and not Path(options.out).parent.is_dir():
            raise ValueError(f"--out must be in an existing folder, got {options.out}")
        swap.use_for_command(options.mine, options.fast)
        folder_of_tasks = options.include_path
        manager = tasks.TaskManager(include_path=folder_of_tasks, include_defaults=folder_of_tasks is None)
        if unknown := [name for name in options.tasks if not manager.match_tasks([name])]:
            raise ValueError(
                f"--tasks must name known tasks, got {', '.join(unknown)}; put your own in --include_path"
            )
        folder = run_dirs.resolve(options.run_dir)
        found = lm_eval.simple_evaluate(
            HarnessModel(str(folder), options.checkpoint, options.device, options.batch_size),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
        )
        print(utils.make_table(found))
        if options.out is not None:
            results = {name: found[name] for name in ("results", "n-samples", "versions", "n-shot")}
            files.write(Path(options.out), json.dumps(results, indent=2) + "\n")
            print(f"written to {options.out}")
        return 0
