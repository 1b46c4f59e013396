"""Verify, list and prune the checkpoints of a run.

uv run python -m llm_basics.checkpoint verify runs/NAME
uv run python -m llm_basics.checkpoint list runs/NAME
uv run python -m llm_basics.checkpoint prune runs/NAME --keep 1
"""

from llm_basics.cli import parse, subcommands

if __name__ == "__main__":
    options = parse.command_options(subcommands.CHECKPOINT)

    from llm_basics.cli import checkpoint_commands

    checkpoint_commands.main(options)
