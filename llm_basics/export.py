"""Export a trained model in the format of Hugging Face transformers.

uv run python -m llm_basics.export runs/NAME --out my_model
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.ExportConfig())

    from llm_basics.interop import hf_export

    signals.run(hf_export.main, options)
