"""Generate text with a trained model.

uv run python -m llm_basics.generate runs/NAME --prompt "def " --samples 4 --min_p 0.1
uv run python -m llm_basics.generate runs/NAME --prompts prompts.txt --out texts.jsonl
uv run python -m llm_basics.generate runs/NAME --prompt "def " --show_probs
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    options = parse.command_options(commands.GenerateConfig())

    from llm_basics.inference import samples

    sys.exit(samples.main(options))
