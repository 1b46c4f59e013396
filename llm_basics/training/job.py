"""A training job, from options to an exit status: set up, train, report."""

import sys
from collections.abc import Callable

from llm_basics import swap
from llm_basics.analysis import figures
from llm_basics.cli import parse
from llm_basics.core import config, evaluate, files
from llm_basics.data import chat_template
from llm_basics.runs import console, process, run_dir, signals, stopwatch
from llm_basics.training import distributed, job_errors, loop, lr_finder, memory, setup, state

# timeout for loggers to finish after a stop signal
CLOSE_SECONDS = 2.0

# a final validation loss that is higher than the best by this is reported, in nats
OVERFITTING = 0.2

# exit statuses in addition to 0, those of signals and those of `parse.exit_on_error`
NOT_SAME, NO_RATE = 1, 5


def conclude(training: state.TrainingState, output: run_dir.RunDir, steps: int, seconds: float) -> None:
    """Evaluate, save and print the results of a run that took `steps` steps in `seconds`."""
    options = training.options.train
    metrics = training.evaluate(10 * options.eval_batches)
    output.metrics(training.step, **metrics)
    loop.is_best(training, output, metrics["val_loss"])
    loop.save(training, output, wait=True)
    training.on_main(lambda: output.sample(training.step, *training.sample()))
    if training.best_loss is not None and metrics["val_loss"] > training.best_loss + OVERFITTING:
        output.log(
            f"warning: overfitting: the validation loss rose from {training.best_loss:.3f} to "
            f"{metrics['val_loss']:.3f}; use --checkpoint best, and train on more text or for fewer steps"
        )
    entropy = evaluate.unigram_entropy(training.held_out)
    figure: object = "not drawn"
    try:
        if distributed.is_main():
            figure = figures.plot_loss(output.folder, entropy)
    except files.WriteError as error:
        output.log(f"warning: {error}")
    saved = (training.saved_in or output.checkpoint_path(training.step)) if training.is_saved else "not saved"
    output.log(
        f"\n{steps} steps in {seconds:.0f} s\n"
        f"validation loss   {metrics['val_loss']:.3f} nats per token "
        f"(unigram entropy baseline: {entropy:.3f})\n"
        f"perplexity        {metrics['perplexity']:.1f}\n"
        f"bits per byte     {metrics['bits_per_byte']:.3f}\n"
        f"accuracy          {metrics['accuracy']:.1%} of next tokens\n"
        f"loss curve        {figure}\n"
        f"checkpoint        {saved}\n"
        + (
            f"one file          uv run python -m llm_basics.checkpoint merge {saved}"
            if training.writer is not None
            else f"chat              uv run python -m llm_basics.chat {output.folder}"
            if chat_template.is_chat(training.tokenizer)
            else f"generate text     uv run python -m llm_basics.generate {output.folder}"
        )
    )


def work(training: state.TrainingState, output: run_dir.RunDir, clock: stopwatch.Stopwatch) -> int:
    """Train, or search for a learning rate; `clock` started with the program. Returns the exit status."""
    first_step = training.step
    setup.print_summary(training, output)
    if training.options.find_lr:
        return 0 if lr_finder.search(training, output) is not None else NO_RATE
    with distributed.sharing_signals():
        with process.gc_frozen():
            loop.fit(training, output)
        conclude(training, output, training.step - first_step, clock.total())
    if training.is_same_as_replayed is False:
        return NOT_SAME
    return 0 if training.is_saved else parse.NOT_SAVED


def main(
    options: config.Config,
    make: Callable[[config.Config], state.TrainingState] = setup.of_text,
    work: Callable[[state.TrainingState, run_dir.RunDir, stopwatch.Stopwatch], int] = work,
) -> int:
    """Run `work` on the training state that `make` returns, in each process of a job.

    Returns the exit status.
    """
    with job_errors.main_writes(), parse.exit_on_error(flush=False):
        distributed.check(options)
    with distributed.joined(options.train):
        return job_errors.run(lambda: run(options, make, work))


def run(
    options: config.Config,
    make: Callable[[config.Config], state.TrainingState],
    work: Callable[[state.TrainingState, run_dir.RunDir, stopwatch.Stopwatch], int],
) -> int:
    """`main` within the process group."""
    clock = stopwatch.Stopwatch()
    # before the model is allocated, so that its weights benefit
    process.tune_allocator()
    with signals.listening(), swap.restored():
        try:
            # a run continues if its standard output is closed
            with parse.exit_on_error(flush=False), signals.anywhere():
                training, output = setup.start(options, make)
        except signals.Stopped as stop:
            console.print_line(f"stopped by {stop.name} before the first step")
            return stop.status
        except memory.NotEnoughMemory as error:
            print(f"error: {error}", file=sys.stderr)
            return parse.NO_MEMORY
        try:
            return work(training, output, clock)
        except signals.Stopped as stop:
            advice = "no weights kept" if options.find_lr else f"resume with --resume {output.folder}"
            console.print_line(f"stopped by {stop.name} after step {training.step}; {advice}")
            output.close(seconds=CLOSE_SECONDS)
            return stop.status
        except memory.NotEnoughMemory as error:
            print(f"error: {error}", file=sys.stderr)
            return parse.NO_MEMORY
        except FloatingPointError as error:
            print(f"error: {error}; the weights are those after step {training.step}", file=sys.stderr)
            return parse.NOT_FINITE
        except OSError as error:
            print(f"error: {parse.message(error)}; earlier checkpoints are unchanged", file=sys.stderr)
            return parse.NOT_SAVED
        except (RuntimeError, MemoryError) as error:
            if not process.is_out_of_memory(error):
                raise  # possibly since another process of the job has failed
            needs = setup.estimate(training.options)
            advice = memory.describe(needs, training.options) if needs else setup.NOT_ESTIMATED
            print(f"error: out of memory\n{advice}", file=sys.stderr)
            return parse.NO_MEMORY
        finally:
            output.close()
