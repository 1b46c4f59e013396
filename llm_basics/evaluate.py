"""Evaluate trained models on held-out text and multiple-choice questions.

uv run python -m llm_basics.evaluate runs/NAME --choices questions.jsonl --out report.json
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.EvaluateConfig())

    from llm_basics.evaluation import compare_models

    signals.run(compare_models.main, options)
