"""Fine-tune a trained model on conversations (supervised fine-tuning, SFT).

uv run python -m llm_basics.sft --init_from runs/NAME                        on synthetic questions
uv run python -m llm_basics.sft --init_from runs/NAME --data answers.jsonl --train.steps 500
uv run python -m llm_basics.sft --resume runs/CHAT                           resume a stopped run
"""

import sys

from llm_basics.cli import parse
from llm_basics.fast import kernel_cache
from llm_basics.runs import signals

if __name__ == "__main__":
    options = parse.train_command_options(preset="sft")
    signals.install()  # before torch is imported, so that no signal is lost
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.training import sft

    sys.exit(sft.main(options))
