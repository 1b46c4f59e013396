"""The training loop: steps, with evaluation, samples and checkpoints where due."""

import contextlib
import math
from collections.abc import Iterator

import torch

from llm_basics.core import files
from llm_basics.runs import checkpoint, run_dir, sharded_checkpoint, signals
from llm_basics.training import distributed, steering
from llm_basics.training import monitor as monitors
from llm_basics.training import state as training_state


def fit(state: training_state.TrainingState, output: run_dir.RunDir) -> None:
    """Train to the last step, with evaluation, samples and checkpoints.

    Raises signals.Stopped, after saving, on a stop signal; FloatingPointError and files.WriteError unless the
    options skip or warn.
    """
    monitor, commands = monitors.Monitor(state, output), steering.Steering(state, output)
    state.model.train()
    with saved_on_exit(state, output, monitor):  # at the end, on a signal, on an error
        between_steps(state, output, monitor, commands)  # work that was due when the run stopped
        while state.step < state.options.train.steps:
            signals.poll()
            step, batches, options = state.step + 1, state.next_batches(), state.options.train
            try:
                result = state.train_step(batches, monitor.accept)
            except FloatingPointError as error:
                result = monitor.skip(step, batches, error)  # raises again unless on_nonfinite is "skip"
            state.advance()
            distributed.expect_steps(options.timeout_seconds)
            monitor.record(step, batches, result)  # on a GPU this reads the metrics of the previous step
            between_steps(state, output, monitor, commands)


def between_steps(
    state: training_state.TrainingState,
    output: run_dir.RunDir,
    monitor: monitors.Monitor,
    commands: steering.Steering,
) -> None:
    """Evaluate, sample and save where due or requested; after the last step `job.conclude` does."""
    requested = commands.between_steps()  # may change the options
    options, step, is_lowest = state.options.train, state.step, False
    is_pending = not state.evaluated and step != options.steps
    if state.evaluated and not requested:
        return
    if "evaluate" in requested or (is_pending and _due(step, options.eval_every)):
        with monitor.paused():
            metrics = state.evaluate(options.eval_batches)
            output.metrics(step, **metrics)
            is_lowest = is_best(state, output, metrics["val_loss"])
    if "sample" in requested or (is_pending and _due(step, options.sample_every)):
        with monitor.paused():
            state.on_main(lambda: output.sample(step, *state.sample()))
    state.evaluated = True
    if is_lowest or "save" in requested or (is_pending and _due(step, options.checkpoint_every)):
        with monitor.paused():
            save(state, output)


@contextlib.contextmanager
def saved_on_exit(
    state: training_state.TrainingState, output: run_dir.RunDir, monitor: monitors.Monitor
) -> Iterator[None]:
    """Record pending steps and save the weights, however the block ends."""
    try:
        try:
            yield
        except signals.Stopped:
            monitor.flush()
            raise
        monitor.flush()
    except signals.Stopped as stop:
        save(state, output, wait=True)
        output.event(state.step, "stopped", signal=stop.name)
        raise
    except (FloatingPointError, OSError) as error:
        with contextlib.suppress(FloatingPointError, OSError):
            monitor.flush()
        # the error may be caused by the weights, or prevent saving
        if all(torch.isfinite(p).all() for p in state.model.parameters()):
            with contextlib.suppress(OSError):
                save(state, output, wait=True)
        with contextlib.suppress(OSError):
            output.event(state.step, "failed", reason=str(error))
        raise
    save(state, output)


def is_best(state: training_state.TrainingState, output: run_dir.RunDir, val_loss: float) -> bool:
    """Record a validation loss, with a warning if it is not finite; True if it is the lowest so far."""
    if not math.isfinite(val_loss):
        output.log(f"warning: the validation loss after step {state.step} is {val_loss}")
    return state.is_best(val_loss)


def save(state: training_state.TrainingState, output: run_dir.RunDir, wait: bool = False) -> None:
    """Write a checkpoint unless this step has one, and delete old ones.

    With `wait`, returns after a checkpoint written in the background is complete.
    """
    options = state.options.train
    is_saved = state.saved == (state.step, state.val_loss)
    try:
        if not is_saved:
            state.save(output.checkpoint_path(state.step))
        if wait:
            state.finish_saving()
    except files.WriteError as error:
        if options.on_save_error == "stop":
            raise
        output.log(f"warning: {error}; training continues")
        return
    if is_saved:
        return
    output.event(state.step, "checkpoint", val_loss=state.val_loss)
    try:
        if options.keep_checkpoints and distributed.is_main():
            checkpoint.prune(output.checkpoints, options.keep_checkpoints)
            sharded_checkpoint.prune(output.checkpoints, options.keep_checkpoints)
    except OSError as error:
        output.log(f"warning: old checkpoints could not be deleted ({error})")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
