"""Train with a grid of settings and compare the results.

uv run python -m llm_basics.sweep lr --jobs 2
uv run python -m llm_basics.sweep mine.yaml --out runs/mine
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.SweepConfig())

    from llm_basics.analysis import sweep

    signals.run(sweep.main, options)
