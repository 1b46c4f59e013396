"""`steer`: sends changes to a run that trains, and prints its answer."""

from llm_basics.cli import commands, parse
from llm_basics.runs import run_dir, steering


def main(options: commands.SteerConfig) -> None:
    """Send the changes and print the answer; on an error or a refusal, print one line and exit with 2."""
    with parse.exit_on_error():
        folder = run_dir.resolve(options.run_dir)
        values, actions = steering.parse(options.changes)
        command_id = steering.send(folder, values, actions)
        answer = steering.answer(folder, command_id, options.wait_seconds)
        if answer is None:
            print(f"sent; {folder} has not answered within {options.wait_seconds:g} s, see {run_dir.EVENTS}")
            return
        if answer["event"] == "refused":
            raise ValueError(f"{answer['reason']}; nothing was changed")
        print(f"step {answer['step']}: {steering.describe(answer)}")
        if "stop" in actions:
            print(f"resume with --resume {folder}")
