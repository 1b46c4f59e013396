"""Between two steps: replays recorded changes, executes commands, compares weights with a replayed run."""

import dataclasses
from pathlib import Path
from typing import Any

from llm_basics.core import files
from llm_basics.runs import checkpoint, inbox, run_dir, signals, steering
from llm_basics.training import distributed
from llm_basics.training import state as training_state


class Steering:
    """Applies changes to the options of a run, and records them in events.jsonl."""

    def __init__(self, state: training_state.TrainingState, output: run_dir.RunDir) -> None:
        self.state, self.output = state, output
        # changes to replay: of another run, or of this one after the checkpoint that it resumes from
        self.due = [
            change
            for change in steering.read_changes(output.folder)
            if change.step >= state.step and change.name in steering.REPLAYABLE
        ]
        # the step and the weights of the replayed run to compare with
        self.compared: tuple[int, str] | None = None
        if state.options.replay is not None:
            path, _ = checkpoint.newest_valid(Path(state.options.replay) / run_dir.CHECKPOINTS)
            if path is None:
                output.log(f"warning: {state.options.replay} has no valid checkpoint to compare with")
            else:
                self.compared = checkpoint.read_about(path)["step"], checkpoint.weights_sha256(path)

    def between_steps(self) -> set[str]:
        """Apply recorded changes and new commands. Returns the requested actions."""
        if self.due and self.due[0].step <= self.state.step:
            self._repeat()
        if self.compared and self.compared[0] == self.state.step:
            self._compare(self.compared[1])
        actions: set[str] = set()
        for line in distributed.from_main(self.output.inbox.lines()):
            actions |= self._execute(line)
        return actions

    def _repeat(self) -> None:
        """Apply all recorded changes that are due."""
        step = self.state.step
        values = {change.name: change.value for change in self.due if change.step <= step}
        self.due = [change for change in self.due if change.step > step]
        try:
            changed = self._set(steering.with_values(self.state.options, values, run_dir.EVENTS))
        except ValueError as error:  # after another option was changed, on the resume or by a command
            kept = {name: 2 * [steering.value_of(self.state.options, name)] for name in values}
            self.output.event(step, "refused", reason=str(error), changed=kept)
            self.output.log(f"warning: a recorded change after step {step} was refused: {error}")
            return
        if changed:
            self.output.log(f"step {step}: {steering.describe({'changed': changed})}, as recorded")

    def _execute(self, line: str) -> set[str]:
        """Execute a command, or refuse it. Returns its actions."""
        step, command = self.state.step, {}
        try:
            command = files.parse_json(line, inbox.COMMANDS)
            if not isinstance(command, dict):
                raise ValueError(f"a command must be an object, got {line[:80]}")
            values, actions = command.get("set", {}), command.get("do", [])
            steering.check(values, actions)
            options = steering.with_values(self.state.options, values, "steer")
        except ValueError as error:
            about = command if isinstance(command, dict) else {}
            self.output.event(step, "refused", reason=str(error), id=about.get("id"))
            self.output.log(f"warning: a command after step {step} was refused: {error}")
            return set()
        self.due = [change for change in self.due if change.name not in values]
        changed = self._set(options)
        event = {"changed": changed, "do": actions, "id": command.get("id")}
        self.output.event(step, "steered", **event)
        self.output.log(f"step {step}: {steering.describe(event)}, by command")
        if "stop" in actions:
            signals.request_stop()
        return set(actions)

    def _set(self, options: Any) -> dict[str, list[Any]]:
        """Set the options from the next step. Returns the old and new values of changed options."""
        before, self.state.options = self.state.options, options
        changed = {
            name: [steering.value_of(before, name), steering.value_of(options, name)]
            for name in sorted(steering.REPLAYABLE)
            if steering.value_of(before, name) != steering.value_of(options, name)
        }
        if changed:
            self.output.write_config(dataclasses.asdict(options))
        return changed

    def _compare(self, expected: str) -> None:
        """Compare the SHA-256 of the weights with `expected`, that of the replayed run."""
        step = self.state.step
        trained = self.state.adapters
        digest = self.state.on_main(lambda: checkpoint.weights_sha256(trained or self.state.model))
        (found,) = distributed.from_main([digest or ""])
        self.state.is_same_as_replayed = found == expected
        self.output.event(step, "replayed", sha256=found, expected=expected)
        where = f"{self.state.options.replay} after step {step}"
        if found == expected:
            self.output.log(f"replay: the weights equal those of {where} (SHA-256 {found})")
        else:
            self.output.log(
                f"warning: the weights differ from those of {where} (SHA-256 {found}, expected {expected}); "
                "a replay needs the same machine, versions, number of threads and options"
            )
