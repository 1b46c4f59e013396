"""Train a fine-tuned model on rewards of its own responses (reinforcement learning, GRPO).

uv run python -m llm_basics.rl --init_from runs/CHAT                  exact answers to synthetic questions
uv run python -m llm_basics.rl --init_from runs/CHAT --data answers.jsonl --rl.reward my_reward.py:score
uv run python -m llm_basics.rl --resume runs/RL                       resume a stopped run
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse
    from llm_basics.fast import kernel_cache
    from llm_basics.post_training import options as post_options

    options = parse.train_command_options("rl", post_options.RlConfig())
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.post_training import rl

    signals.run(rl.main, options)
