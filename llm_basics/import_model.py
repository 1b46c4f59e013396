"""Import a model that transformers has saved, as a run directory.

uv run python -m llm_basics.import_model path/to/gpt2 --out runs/gpt2
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.ImportConfig())

    from llm_basics.interop import hf_import

    signals.run(hf_import.main, options)
