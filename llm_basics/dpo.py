"""Train a fine-tuned model on pairs of responses, of which one is preferred (DPO).

uv run python -m llm_basics.dpo --init_from runs/CHAT                      pairs of the model's own responses
uv run python -m llm_basics.dpo --init_from runs/CHAT --data pairs.jsonl   {"prompt", "chosen", "rejected"}
uv run python -m llm_basics.dpo --resume runs/DPO                          resume a stopped run
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse
    from llm_basics.fast import kernel_cache
    from llm_basics.post_training import options as post_options

    options = parse.train_command_options("dpo", post_options.DpoConfig())
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.post_training import dpo

    signals.run(dpo.main, options)
