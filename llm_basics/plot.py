"""Plot the metrics of training runs.

uv run python -m llm_basics.plot newest
uv run python -m llm_basics.plot runs/one runs/two --x time --smooth 20 --out both.png
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.PlotConfig(), sys.argv[1:], "python -m llm_basics.plot")

    from llm_basics.analysis import figures

    sys.exit(figures.main(options))
