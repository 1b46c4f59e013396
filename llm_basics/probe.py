"""Test whether a stack of pieces can learn: small tasks with known answers.

uv run python -m llm_basics.probe                               all tasks, with the reference pieces
uv run python -m llm_basics.probe reverse --mine mine.py        one task, with your pieces
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.ProbeConfig())

    from llm_basics.learn import probe_tasks  # without torch: an unknown task is an immediate error

    with parse.exit_on_error():
        probe_tasks.task_names(options.task)

    from llm_basics.learn import probe

    signals.run(probe.main, options)
