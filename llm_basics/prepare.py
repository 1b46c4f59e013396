"""Tokenize a corpus once, so that training starts at once.

uv run python -m llm_basics.prepare book.txt --out data/book
uv run python -m llm_basics.prepare tinystories --max_tokens 10000000 --out data/stories
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.PrepareConfig())

    from llm_basics.data import prepare

    sys.exit(prepare.main(options))
