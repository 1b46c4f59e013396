"""Train a language model.

uv run python -m llm_basics.train                                   on the source code of Python's library
uv run python -m llm_basics.train --data book.txt --tokenizer bytes --train.steps 2000
uv run python -m llm_basics.train --data book.txt --find_lr         propose a learning rate, do not train
"""

import sys

from llm_basics import command_line, signals

if __name__ == "__main__":
    # before torch is loaded, which takes seconds: --help and mistakes answer at once, and no signal is lost
    OPTIONS = command_line.train_options(sys.argv[1:])
    signals.install()
    command_line.spin_less()

from llm_basics import job

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples may hold any character
    sys.exit(job.main(OPTIONS))
