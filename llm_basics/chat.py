"""Chat with a fine-tuned model, in the terminal or through a pipe.

uv run python -m llm_basics.chat runs/NAME
uv run python -m llm_basics.chat runs/NAME --message "Name a color."
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.ChatConfig())

    from llm_basics.inference import chat_session

    signals.run(chat_session.main, options)
