"""Fine-tune a trained model on conversations (supervised fine-tuning, SFT).

uv run python -m llm_basics.sft --init_from runs/NAME                        on synthetic questions
uv run python -m llm_basics.sft --init_from runs/NAME --data answers.jsonl --train.steps 500
uv run python -m llm_basics.sft --resume runs/CHAT                           resume a stopped run
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse
    from llm_basics.fast import kernel_cache

    options = parse.train_command_options(preset="sft")
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.training import sft

    signals.run(sft.main, options)
