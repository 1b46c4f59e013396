"""Train a language model.

uv run python -m llm_basics.train                                   on the source code of Python's library
uv run python -m llm_basics.train --data book.txt --tokenizer bytes --train.steps 2000
uv run python -m llm_basics.train --data book.txt --find_lr         propose a learning rate, do not train
"""

import sys

from llm_basics import command_line, config, signals

if __name__ == "__main__":
    # before torch is loaded, which takes seconds: --help and mistakes answer at once, and no signal is lost
    OPTIONS = command_line.train_options(sys.argv[1:])
    signals.install()
    command_line.spin_less()

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch

from llm_basics import (
    chat,
    checkpoint,
    device,
    evaluate,
    find_lr,
    followers,
    launch,
    memory,
    plot,
    run,
    session,
    swap,
    update,
)

# steps in a row that may be left out because something was not finite
MOST_SKIPPED = 10

# what followers have to finish when the run was asked to stop
HASTE_SECONDS = 2.0

# exit statuses beside 0 and those of signals; 2 is a mistake in what was asked for
NOT_FINITE, NOT_SAVED, NO_MEMORY, NO_RATE = 1, 3, 4, 5

# --------------------------------------------------------------------------------------------------
# All steps


def fit(training: session.Session, output: run.Run) -> None:
    """Train to the last step. On the way, record, evaluate, sample and save.

    Raises signals.Stopped, when all is saved, if that was requested; FloatingPointError, session.SaveError
    and OSError as the options say.
    """
    steps = Steps(training, output)
    training.model.train()
    try:
        while True:
            if not training.looked:
                with steps.clock.paused():
                    look(training, output)
            if signals.came():
                steps.settle()
                signals.poll()
            if training.step == training.options.train.steps:
                break
            steps.take()
    except signals.Stopped:
        save(training, output)
        raise
    except (FloatingPointError, OSError):
        with contextlib.suppress(FloatingPointError, OSError):
            steps.settle()
        # the weights are those of the last step; but what began this may be in them, or in the way
        if all(torch.isfinite(p).all() for p in training.model.parameters()):
            with contextlib.suppress(session.SaveError, OSError):
                save(training, output)
        raise
    save(training, output)


@dataclasses.dataclass
class _Begun:
    """A step that nobody has waited for, and where training stood before it."""

    result: Callable[[], update.StepResult]
    n_tokens: int
    random_state: list[torch.Tensor]
    place: session.Place


class Steps:
    """One step after the other. A GPU is given the next before it has said what came of the last."""

    def __init__(self, training: session.Session, output: run.Run) -> None:
        self.training, self.output = training, output
        self.clock = run.Stopwatch()
        self.begun: _Begun | None = None
        # since the last line; and in a row
        self.timed = self.left_out = 0

    def take(self) -> None:
        """Take a step, or begin it, and see how the one before ended: if badly, what began is void."""
        training, place = self.training, self.training.place
        step, batches = place.step + 1, training.next_batches()
        n_tokens = sum(targets.numel() for _, targets in batches)
        random_state = device.random_state(training.device)
        accepts = _judge(training, self.output)
        try:
            result = update.queue_step(
                training.model, training.optimizer, batches, step, training.options.train, accepts
            )
        except FloatingPointError as error:
            self._leave_out(error, random_state, step, n_tokens)
            return
        training.finish_step()
        if not callable(result):
            self.left_out = 0
            self._count(result, step, n_tokens)
            return
        before, self.begun = self.begun, _Begun(result, n_tokens, random_state, place)
        if before is not None:
            self._end(before)
        if is_looked_at(training.step, training.options.train):
            self.settle()

    def settle(self) -> None:
        """Wait for the step that has begun, if one has."""
        begun, self.begun = self.begun, None
        if begun is not None:
            self._end(begun)

    def _end(self, begun: _Begun) -> None:
        about = begun.place.step + 1, begun.n_tokens
        try:
            result = begun.result()
        except FloatingPointError as error:
            self.begun, self.training.place = None, begun.place
            self._leave_out(error, begun.random_state, *about)
        else:
            self.left_out = 0
            self._count(result, *about)

    def _leave_out(
        self, error: FloatingPointError, random_state: list[torch.Tensor], step: int, n_tokens: int
    ) -> None:
        """Go on without a step, where the options allow that; else raise `error`."""
        training = self.training
        self.left_out += 1
        device.set_random_state(random_state, training.device)
        if training.options.train.on_nonfinite == "stop":
            raise error
        is_whole = all(torch.isfinite(p).all() for p in training.model.parameters())
        if self.left_out > MOST_SKIPPED or not is_whole:
            raise FloatingPointError(
                f"{error}; to leave out steps does not help, {self.left_out} in a row were"
            )
        self.output.say(f"warning: {error}; the step is left out")
        training.finish_step()
        nan = torch.full((), math.nan)
        lr = training.optimizer.param_groups[0]["lr"]
        self._count(update.StepResult(nan, nan, lr, updated=False), step, n_tokens)

    def _count(self, result: update.StepResult, step: int, n_tokens: int) -> None:
        """Count a step, and write a line if it is due."""
        options = self.training.options.train
        self.timed += 1
        if _due(step, options.log_every) or step in (1, options.steps) or not result.updated:
            train_loss, grad_norm = result.train_loss.item(), result.grad_norm.item()
            seconds = self.clock.lap() / self.timed
            self.output.metrics(
                step,
                train_loss=train_loss,
                lr=result.lr,
                grad_norm=grad_norm,
                step_seconds=seconds,
                tokens_per_second=n_tokens / seconds,
                eta_seconds=(options.steps - step) * seconds,
            )
            self.timed = 0


def is_looked_at(step: int, options: config.TrainConfig) -> bool:
    """Whether something is due after a step that needs its weights."""
    due = options.eval_every, options.sample_every, options.checkpoint_every
    return step == options.steps or any(_due(step, every) for every in due)


def look(training: session.Session, output: run.Run) -> None:
    """Do what is due after a step: evaluate, sample, save. The last step is left to `conclude`."""
    options, step, is_best = training.options.train, training.step, False
    if step < options.steps:
        if _due(step, options.eval_every):
            metrics = training.evaluate(options.eval_batches)
            output.metrics(step, **metrics)
            is_best = _is_best(training, output, metrics["val_loss"])
        if _due(step, options.sample_every):
            output.sample(step, *training.sample())
    training.looked = True
    if is_best or (step < options.steps and _due(step, options.checkpoint_every)):
        save(training, output)


def _is_best(training: session.Session, output: run.Run, val_loss: float) -> bool:
    if not math.isfinite(val_loss):
        output.say(f"warning: the validation loss after step {training.step} is {val_loss}")
    return training.is_best(val_loss)


def save(training: session.Session, output: run.Run) -> None:
    """Write a checkpoint unless there is one, and delete those that are not kept."""
    options = training.options.train
    if training.saved == (training.step, training.val_loss):
        return
    try:
        training.save(output.checkpoint_path(training.step))
    except session.SaveError as error:
        if options.on_save_error == "stop":
            raise
        output.say(f"warning: {error}; training goes on")
        return
    try:
        if options.keep_checkpoints:
            checkpoint.prune(output.checkpoints, options.keep_checkpoints)
    except OSError as error:
        output.say(f"warning: old checkpoints could not be deleted ({error})")


def _judge(training: session.Session, output: run.Run) -> Callable[[float], bool]:
    """What says of the loss of the next step whether it is to be learned from."""
    step = training.step + 1

    def accepts(loss: float) -> bool:
        score = training.spikes.z_score(loss)
        if score <= training.spikes.threshold:
            return True
        is_left_out = training.options.train.on_spike == "skip"
        output.say(
            f"step {step}: the loss {loss:.4g} is a spike, {score:.0f} deviations above the "
            "median of those before" + (", and the step is left out" if is_left_out else "")
        )
        return not is_left_out

    return accepts


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# --------------------------------------------------------------------------------------------------
# The program


def conclude(training: session.Session, output: run.Run, steps: int, seconds: float) -> None:
    """Measure what was learned, and say where it is. This run made `steps` steps in `seconds`, all told."""
    options = training.options.train
    metrics = training.evaluate(10 * options.eval_batches)
    output.metrics(training.step, **metrics)
    _is_best(training, output, metrics["val_loss"])
    save(training, output)
    output.sample(training.step, *training.sample())
    entropy = evaluate.unigram_entropy(training.held_out)
    figure: object = "not drawn"
    try:
        figure = plot.plot_loss(output.folder, entropy)
    except OSError as error:
        output.say(f"warning: the loss curve could not be written ({error.strerror})")
    saved = output.checkpoint_path(training.step) if training.is_saved else "not saved"
    output.say(
        f"\n{steps} steps in {seconds:.0f} s\n"
        f"validation loss   {metrics['val_loss']:.3f} nats per token "
        f"(unigram entropy, which counting tokens would reach: {entropy:.3f})\n"
        f"perplexity        {metrics['perplexity']:.1f}\n"
        f"bits per byte     {metrics['bits_per_byte']:.3f}\n"
        f"accuracy          {metrics['accuracy']:.1%} of next tokens\n"
        f"loss curve        {figure}\n"
        f"checkpoint        {saved}\n"
        + (
            f"talk to it        uv run python -m llm_basics.chat {output.folder}"
            if chat.is_chat(training.tokenizer)
            else f"let it write      uv run python -m llm_basics.generate {output.folder}"
        )
    )


def work(training: session.Session, output: run.Run, clock: run.Stopwatch) -> int:
    """What a run does once it is ready; `clock` began with the program. Returns the exit status."""
    first_step = training.step
    launch.introduce(training, output)
    if training.options.find_lr:
        return 0 if find_lr.search(training, output) is not None else NO_RATE
    with device.garbage_set_aside():
        fit(training, output)
    conclude(training, output, training.step - first_step, clock.total())
    return 0 if training.is_saved else NOT_SAVED


def main(
    options: config.Config,
    make: Callable[[config.Config], session.Session] = launch.of_text,
    work: Callable[[session.Session, run.Run, run.Stopwatch], int] = work,
) -> int:
    """Train as `options` say: do `work` on the run that `make` opens. Returns the exit status."""
    clock = run.Stopwatch()
    # before there is a model: where its weights lie counts too
    device.keep_memory()
    with signals.listening(), swap.restored():
        try:
            with command_line.exit_on_mistake(), signals.anywhere():
                training, output = launch.start(options, make)
        except signals.Stopped as stop:
            followers.tell(f"stopped by {stop.name} before the first step")
            return stop.status
        except session.SaveError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_SAVED
        try:
            return work(training, output, clock)
        except signals.Stopped as stop:
            advice = "nothing is kept" if options.find_lr else f"go on with --resume {output.folder}"
            followers.tell(f"stopped by {stop.name} after step {training.step}; {advice}")
            output.close(seconds=HASTE_SECONDS)
            return stop.status
        except FloatingPointError as error:
            print(f"error: {error}; the weights are as they were after step {training.step}", file=sys.stderr)
            return NOT_FINITE
        except (session.SaveError, OSError) as error:
            print(f"error: {error}; earlier checkpoints are as they were", file=sys.stderr)
            return NOT_SAVED
        except (RuntimeError, MemoryError) as error:
            if not device.is_out_of_memory(error):
                raise
            needs = launch.estimate(training.options)
            advice = memory.explain(needs, training.options) if needs else launch.UNKNOWN
            print(f"error: memory is not enough\n{advice}", file=sys.stderr)
            return NO_MEMORY
        finally:
            output.close()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples may hold any character
    sys.exit(main(OPTIONS))
