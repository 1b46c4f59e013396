"""Import a model that transformers has saved, as a run directory.

uv run python -m llm_basics.import_model path/to/gpt2 --out runs/gpt2
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.ImportConfig())

    from llm_basics.interop import hf_import

    sys.exit(hf_import.main(options))
