"""Generate text with a trained model.

uv run python -m llm_basics.generate runs/NAME --prompt "def " --samples 4 --min_p 0.1
uv run python -m llm_basics.generate runs/NAME --prompts prompts.txt --out texts.jsonl
uv run python -m llm_basics.generate runs/NAME --prompt "def " --show_probs
"""

import sys

from llm_basics.cli import commands, parse

if __name__ == "__main__":
    # parsed before torch is imported, which takes seconds: --help and errors answer at once
    options = parse.program_options(commands.GenerateConfig(), sys.argv[1:], "python -m llm_basics.generate")
    parse.reduce_spin_wait()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # text of any kind

    from llm_basics.inference import samples

    sys.exit(samples.main(options))
