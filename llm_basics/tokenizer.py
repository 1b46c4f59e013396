"""Train a tokenizer, encode with it, inspect and compare tokenizers.

uv run python -m llm_basics.tokenizer train --data book.txt --vocab-size 2000 --out my_tokenizer
uv run python -m llm_basics.tokenizer encode --data book.txt --tokenizer my_tokenizer --out tokens
uv run python -m llm_basics.tokenizer inspect "It's a tokenizer." --tokenizer my_tokenizer
uv run python -m llm_basics.tokenizer compare my_tokenizer gpt2 --data book.txt
"""

import sys

from llm_basics.data import tokenizer_commands

if __name__ == "__main__":
    tokenizer_commands.main(sys.argv[1:])
