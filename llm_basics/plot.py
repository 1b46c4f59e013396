"""Plot the metrics of training runs.

uv run python -m llm_basics.plot newest
uv run python -m llm_basics.plot runs/one runs/two --x time --smooth 20 --out both.png
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.PlotConfig())

    from llm_basics.analysis import figures

    signals.run(figures.main, options)
