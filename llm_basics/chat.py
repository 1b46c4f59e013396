"""Chat with a fine-tuned model, in the terminal or through a pipe.

uv run python -m llm_basics.chat runs/NAME
uv run python -m llm_basics.chat runs/NAME --message "Name a color."
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.ChatConfig(), sys.argv[1:], "python -m llm_basics.chat")
    parse.reduce_spin_wait()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # bytes of any kind

    from llm_basics.inference import chat_session

    sys.exit(chat_session.main(options))
