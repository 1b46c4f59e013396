"""Train with a grid of settings and compare the results.

uv run python -m llm_basics.sweep lr --jobs 2
uv run python -m llm_basics.sweep mine.yaml --out runs/mine
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.SweepConfig())

    from llm_basics.analysis import sweep

    sys.exit(sweep.main(options))
