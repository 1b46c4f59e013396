"""Print a completion script for the shell: commands, options and files.

source <(llm-basics completion)            bash; in ~/.bashrc
source <(llm-basics completion zsh)        zsh; in ~/.zshrc
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, completion, parse

    options = parse.command_options(commands.CompletionConfig())

    signals.run(completion.main, options)
