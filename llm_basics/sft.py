"""Fine-tune a trained model on conversations (supervised fine-tuning, SFT).

uv run python -m llm_basics.sft --init_from runs/NAME                        on synthetic questions
uv run python -m llm_basics.sft --init_from runs/NAME --data answers.jsonl --train.steps 500
uv run python -m llm_basics.sft --resume runs/CHAT                           resume a stopped run
"""

import sys

from llm_basics.cli import parse
from llm_basics.runs import signals

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help answers at once, no signal is lost
    options = parse.train_options(sys.argv[1:], prog="python -m llm_basics.sft", preset="sft")
    signals.install()
    parse.reduce_spin_wait()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # answers may hold any character

    from llm_basics.training import sft

    sys.exit(sft.main(options))
