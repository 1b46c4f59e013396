"""Train with a grid of settings and compare the results.

uv run python -m llm_basics.sweep lr --jobs 2
uv run python -m llm_basics.sweep mine.yaml --out runs/mine
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.SweepConfig(), sys.argv[1:], "python -m llm_basics.sweep")

    from llm_basics.analysis import sweep

    sys.exit(sweep.main(options))
