"""Verify, list and prune the checkpoints of a run.

uv run python -m llm_basics.checkpoint verify runs/NAME
uv run python -m llm_basics.checkpoint list runs/NAME
uv run python -m llm_basics.checkpoint prune runs/NAME --keep 1
"""

import sys

from llm_basics.cli import checkpoint_commands

if __name__ == "__main__":
    checkpoint_commands.main(sys.argv[1:])
