"""Evaluate a trained model with EleutherAI's lm-evaluation-harness.

uv run --extra eval python -m llm_basics.lm_harness runs/NAME --tasks arc_easy hellaswag
uv run --extra eval python -m llm_basics.lm_harness runs/NAME --tasks mine --include_path folder
"""

import importlib.util

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.HarnessConfig())
    with parse.exit_on_error():
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("lm_harness needs lm_eval, which is not installed; run uv sync --extra eval")

    from llm_basics.evaluation import lm_harness

    signals.run(lm_harness.main, options)
