"""Test whether a stack of pieces can learn: small tasks with known answers.

uv run python -m llm_basics.probe                               all tasks, with the reference pieces
uv run python -m llm_basics.probe reverse --mine mine.py        one task, with your pieces
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.ProbeConfig(), sys.argv[1:], "python -m llm_basics.probe")
    parse.reduce_spin_wait()

    from llm_basics.learn import probe

    sys.exit(probe.main(options))
