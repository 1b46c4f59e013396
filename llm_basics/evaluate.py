"""Evaluate trained models on held-out text and multiple-choice questions.

uv run python -m llm_basics.evaluate runs/NAME --choices questions.jsonl --out report.json
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.EvaluateConfig())

    from llm_basics.evaluation import compare_models

    sys.exit(compare_models.main(options))
