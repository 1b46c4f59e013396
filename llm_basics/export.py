"""Export a trained model in the format of Hugging Face transformers.

uv run python -m llm_basics.export runs/NAME --out my_model
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.ExportConfig())

    from llm_basics.interop import hf_export

    sys.exit(hf_export.main(options))
