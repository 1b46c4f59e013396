"""Generate text with a trained model.

uv run python -m llm_basics.generate runs/NAME --prompt "def " --samples 4 --min_p 0.1
uv run python -m llm_basics.generate runs/NAME --prompts prompts.txt --out texts.jsonl
uv run python -m llm_basics.generate runs/NAME --prompt "def " --show_probs
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.GenerateConfig())

    from llm_basics.inference import samples

    signals.run(samples.main, options)
