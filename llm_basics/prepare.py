"""Tokenize a corpus once, so that training starts immediately.

uv run python -m llm_basics.prepare book.txt --out data/book
uv run python -m llm_basics.prepare tinystories --max_tokens 10000000 --out data/stories
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.PrepareConfig())

    from llm_basics.data import prepare

    signals.run(prepare.main, options)
