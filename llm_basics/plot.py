"""Plot the metrics of training runs.

uv run python -m llm_basics.plot newest
uv run python -m llm_basics.plot runs/one runs/two --x time --smooth 20 --out both.png
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.PlotConfig())

    from llm_basics.analysis import figures

    sys.exit(figures.main(options))
