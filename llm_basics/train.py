"""Train a language model.

uv run python -m llm_basics.train                                   on the source code of Python's library
uv run python -m llm_basics.train --data book.txt --tokenizer bytes --train.steps 2000
uv run python -m llm_basics.train --data book.txt --find_lr         suggest a learning rate, do not train
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse
    from llm_basics.fast import kernel_cache

    options = parse.train_command_options()
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.training import job

    signals.run(job.main, options)
