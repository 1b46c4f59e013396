"""Train a language model.

uv run python -m llm_basics.train                                   on the source code of Python's library
uv run python -m llm_basics.train --data book.txt --tokenizer bytes --train.steps 2000
uv run python -m llm_basics.train --data book.txt --find_lr         suggest a learning rate, do not train
"""

import sys

from llm_basics.cli import parse
from llm_basics.fast import kernel_cache
from llm_basics.runs import signals

if __name__ == "__main__":
    options = parse.train_command_options()
    signals.install()  # before torch is imported, so that no signal is lost
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.training import job

    sys.exit(job.main(options))
