"""Definitions of terms in one line, from the documentation of options, fields and functions, for tooltips."""

import functools
import inspect

from llm_basics.analysis import inspection, norms, run_summary
from llm_basics.cli import commands, overrides
from llm_basics.core import config, evaluate, optim
from llm_basics.core import functional as F
from llm_basics.runs import metric_table, run_dir

# terms defined by the first sentence of the docstring of a function or class
NAMED = {
    "attention": F.scaled_dot_product_attention,
    "checkpoint": run_summary.Checkpoint,
    "embedding neighbors": inspection.neighbors,
    "logit lens": inspection.lens,
    "norms": norms.norms,
    "gradient flow": norms.gradients,
    "rollouts": run_dir.RunDir.rollout,
    "unigram entropy": evaluate.unigram_entropy,
    "schedule": optim.cosine_schedule,
}


@functools.cache
def known() -> dict[str, str]:
    """Definitions by term: options by their names on the command line, metrics as in metrics.jsonl."""
    found: dict[str, str] = {}
    for kind in (commands.GenerateConfig, run_summary.Details, run_summary.Summary, metric_table.Line):
        for each in reversed(kind.__mro__[:-1]):
            found |= overrides.field_docs(each)
    found |= overrides.field_docs(config.Config)
    found |= {option.name: option.help for option in overrides.all_options()}
    return found | {term: first_sentence(inspect.getdoc(piece) or "") for term, piece in NAMED.items()}


def first_sentence(text: str) -> str:
    """The first sentence of a docstring.

    >>> first_sentence("Softmax along the last axis.\\n\\nSubtracts the maximum first.")
    'Softmax along the last axis.'
    """
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, end, _ = paragraph.partition(". ")
    return sentence + end.strip()
