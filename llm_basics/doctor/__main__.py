"""Check this machine for training, or plan a run on other hardware.

uv run python -m llm_basics.doctor            versions, accelerator, memory, disk, one training step
uv run python -m llm_basics.doctor plan --config pretrain_124m --gpus 8 --gpu H100
uv run python -m llm_basics.doctor plan --config gpt2-medium --gpus 2 --gpu_memory 24
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

import dataclasses
import json
import sys
from typing import Any

from llm_basics.cli import parse, subcommands


def main(options: Any) -> int:
    """Run the subcommand that `options` belong to; the exit status is 1 if a check found an error."""
    with parse.exit_on_error():
        if isinstance(options, subcommands.DoctorPlan):
            from llm_basics.doctor import plan

            found = plan.make(options)
            print(json.dumps(dataclasses.asdict(found)) if options.json else plan.describe(found))
            return 0
        from llm_basics.doctor import checks, machine, step

        is_wrong = False
        rows = []
        for each in (*machine.check(options), *step.check(options.device)):
            is_wrong |= each.level == checks.ERROR
            rows.append(dataclasses.asdict(each))
            if not options.json:
                print(each, flush=True)
        if options.json:
            print(json.dumps(rows))
        return int(is_wrong)


if __name__ == "__main__":
    parse.set_up_process()
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["check", *arguments]
    title = (__doc__ or "").partition("\n")[0]
    signals.run(
        main,
        parse.program_options(subcommands.DOCTOR, arguments, "python -m llm_basics.doctor", title),
    )
