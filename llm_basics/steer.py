"""Change the learning rate, intervals and more of a run while it trains.

uv run python -m llm_basics.steer runs/NAME train.lr=1e-3 train.eval_every=50
uv run python -m llm_basics.steer newest sample save                 now; also: evaluate, stop
uv run python -m llm_basics.train --replay runs/NAME                 repeats the run with all its changes
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import commands, parse

    options = parse.command_options(commands.SteerConfig("newest"))

    from llm_basics.cli import steer

    signals.run(steer.main, options)
