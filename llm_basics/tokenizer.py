"""Train a tokenizer, encode with it, inspect and compare tokenizers.

uv run python -m llm_basics.tokenizer train --data book.txt --vocab_size 2000 --out my_tokenizer
uv run python -m llm_basics.tokenizer encode --data book.txt --tokenizer my_tokenizer --out tokens
uv run python -m llm_basics.tokenizer inspect "It's a tokenizer." --tokenizer my_tokenizer
uv run python -m llm_basics.tokenizer compare my_tokenizer gpt2 --data book.txt
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse, subcommands

    options = parse.command_options(subcommands.TOKENIZER)

    from llm_basics.data import tokenizer_commands

    signals.run(tokenizer_commands.main, options)
