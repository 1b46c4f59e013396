"""Compare training runs: results, options that differ, samples.

uv run python -m llm_basics.compare runs/one runs/two
uv run python -m llm_basics.compare runs/* --out report.html
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.CompareConfig())

    from llm_basics.analysis import compare

    signals.run(compare.main, options)
