"""Compare training runs: results, options that differ, samples.

uv run python -m llm_basics.compare runs/one runs/two
uv run python -m llm_basics.compare runs/* --out report.html
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.CompareConfig(), sys.argv[1:], "python -m llm_basics.compare")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # text of any kind

    from llm_basics.analysis import compare

    sys.exit(compare.main(options))
