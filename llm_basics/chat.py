"""Chat with a fine-tuned model, in the terminal or through a pipe.

uv run python -m llm_basics.chat runs/NAME
uv run python -m llm_basics.chat runs/NAME --message "Name a color."
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.ChatConfig())

    from llm_basics.inference import chat_session

    sys.exit(chat_session.main(options))
