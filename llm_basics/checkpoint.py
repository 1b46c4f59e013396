"""Verify, list, prune and convert the checkpoints of a run.

uv run python -m llm_basics.checkpoint verify runs/NAME
uv run python -m llm_basics.checkpoint list runs/NAME
uv run python -m llm_basics.checkpoint prune runs/NAME --keep 1
uv run python -m llm_basics.checkpoint merge runs/NAME/checkpoints/step_00000500.sharded
uv run python -m llm_basics.checkpoint split runs/NAME/checkpoints/step_00000500.safetensors
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse, subcommands

    options = parse.command_options(subcommands.CHECKPOINT)

    from llm_basics.cli import checkpoint_commands

    signals.run(checkpoint_commands.main, options)
