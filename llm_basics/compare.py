"""Compare training runs: results, options that differ, samples.

uv run python -m llm_basics.compare runs/one runs/two
uv run python -m llm_basics.compare runs/* --out report.html
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.CompareConfig())

    from llm_basics.analysis import compare

    sys.exit(compare.main(options))
