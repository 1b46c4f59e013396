"""`steer`: sends changes to a training run, and prints its response."""

from llm_basics.cli import commands, parse
from llm_basics.runs import run_dir, steering


def main(options: commands.SteerConfig) -> None:
    """Send the changes and print the response; on an error or a refusal, print one line and exit with 2."""
    with parse.exit_on_error():
        folder = run_dir.resolve(options.run_dir)
        values, actions = steering.parse(options.changes)
        command_id = steering.send(folder, values, actions)
        response = steering.answer(folder, command_id, options.wait_seconds)
        if response is None:
            print(f"sent; no response of {folder} within {options.wait_seconds:g} s, see {run_dir.EVENTS}")
            return
        if response["event"] == "refused":
            raise ValueError(f"{response['reason']}; nothing was changed")
        print(f"step {response['step']}: {steering.describe(response)}")
        if "stop" in actions:
            print(f"resume with --resume {folder}")
