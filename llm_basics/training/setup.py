"""From options to a training run that can take its first step: data, model, directory, checkpoint."""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from llm_basics import swap
from llm_basics.core import config, device, trainer
from llm_basics.data import prepare
from llm_basics.runs import checkpoint, console, loggers, run_dir
from llm_basics.training import memory, warm_start
from llm_basics.training import state as training_state

# what stands in the place of the estimate
UNKNOWN = "memory    not estimated: your pieces need numbers, where the estimate has shapes alone"


def of_text(options: config.Config) -> training_state.TrainingState:
    """A run that learns to continue the text that `options` name."""
    prepared = prepare.prepare(options)
    if options.resume is None and prepared.folder == Path(options.data):
        # a folder that was prepared has a tokenizer, whatever is asked for when nothing is
        options = dataclasses.replace(options, tokenizer=str(prepared.folder / "tokenizer"))
    model = dataclasses.replace(options.model, vocab_size=prepared.tokenizer.vocab_size)
    return training_state.TrainingState(dataclasses.replace(options, model=model), prepared)


def begin(
    options: config.Config, make: Callable[[config.Config], training_state.TrainingState]
) -> training_state.TrainingState:
    """The run that `make` opens, with the weights of another where a new one is to begin with these."""
    if options.init_from is None or options.resume is not None:
        return make(options)
    warm_start.check(options, options.init_from)
    training = make(options)
    warm_start.load_initial_weights(training.model, options.init_from)
    return training


def start(
    options: config.Config, make: Callable[[config.Config], training_state.TrainingState] = of_text
) -> tuple[training_state.TrainingState, run_dir.RunDir]:
    """Check and make everything that a run needs, and only then its directory; `make` opens what it learns.

    Raises ValueError or OSError for what cannot be done, session.SaveError if the directory is not writable.
    """
    given = Path(options.run_dir or "")
    if options.run_dir and not options.resume and given.is_dir() and any(given.iterdir()):
        advice = f"go on with a run by --resume {given}" if run_dir.checkpoints(given) else "or delete it"
        raise ValueError(f"--run_dir must be new or empty, got {given}; {advice}")
    if options.resume is not None and not run_dir.checkpoints(options.resume):
        raise ValueError(
            f"--resume needs a checkpoint, but {options.resume} has none; delete it and begin again"
        )
    if options.mine is not None:
        if options.resume and not Path(options.mine).exists():
            # the run keeps a copy
            options = dataclasses.replace(options, mine=str(Path(options.resume) / "mine.py"))
        swap.use(str(options.mine))
    if options.fast != "off":
        swap.use("fast")
    device.choose(options.train.device)  # fails now, not after minutes of preparation
    training = begin(options, make)
    folder = options.resume or options.run_dir or run_dir.make_folder(Path(options.config).stem)
    training.options = dataclasses.replace(training.options, run_dir=str(folder))
    try:
        output = run_dir.RunDir(folder, tolerant=options.train.on_save_error == "warn")
        checkpoint.delete_partial(output.checkpoints)
    except OSError as error:
        raise training_state.SaveError(f"the run {folder} could not be written ({error.strerror})") from None
    try:
        if training.is_compiled:
            compile_model(training)
        else:
            ours = training.options
            swap.prepare_model(training.model, ours.train.batch_size, ours.model.context_length)
        if options.resume is not None:
            resume_latest(training, output)
        output.loggers.append(loggers.ConsoleLogger(options.train.steps, training.step))
        output.write_config({**dataclasses.asdict(training.options), run_dir.ORIGINS: swap.user_pieces()})
        if options.mine is not None:
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(options.mine, output.folder / "mine.py")
        if options.resume is None:
            training.tokenizer.save(output.folder / "tokenizer")
        if options.wandb and not options.find_lr:
            about = dataclasses.asdict(training.options)
            output.loggers.append(loggers.WandbLogger(output.folder, about))
    except OSError as error:
        output.close()
        raise training_state.SaveError(
            f"{error.filename or folder} could not be written ({error.strerror})"
        ) from None
    except BaseException:
        output.close()
        raise
    return training, output


def compile_model(training: training_state.TrainingState) -> None:
    """Make the machine code that steps need; where that fails, go on without, and say so."""
    train = training.options.train
    state = device.random_state(training.device)
    console.print_line(
        "compiling the model, for a minute at most as a rule (--train.compile off does without)"
    )
    try:
        inputs, targets = training.next_batches()[0]
        # a graph is recorded the second time, and run the third
        for _ in range(3 if training.is_graph else 1):
            training.optimizer.zero_grad(set_to_none=True)
            with device.precision(inputs.device, train.dtype):
                trainer.batch_loss(training.model, inputs, targets, train.z_loss).backward()
    except Exception as error:
        # a compiler that is not there, or one of the many that it calls
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        console.print_line(f"warning: the model could not be compiled ({reason}); training goes on without")
        training.uncompile()
    training.optimizer.zero_grad(set_to_none=True)
    device.set_random_state(state, training.device)


def resume_latest(training: training_state.TrainingState, output: run_dir.RunDir) -> None:
    """Restore the newest checkpoint that is whole and of this run, and say what is not as it was."""
    unused = {}
    found = None
    for path in checkpoint.files(output.checkpoints):
        try:
            if found is None:
                differences = training.resume(path)
                found = path
            else:
                checkpoint.verify(path)
        except ValueError as error:
            unused[path] = f"not used: {error}"
    if found is None:
        raise ValueError("\n".join(["--resume needs a whole checkpoint of this run", *unused.values()]))
    if training.step > training.options.train.steps:
        raise ValueError(
            f"--train.steps must be at least {training.step}, where the run {output.folder} stands"
        )
    # what cannot be gone on from must not count as one of the newest, or as the best
    for path in unused:
        quarantine(path)
    output.resumed(training.step)
    promise = (
        "not to the last bit what it would have been" if differences else "bit for bit as if never stopped"
    )
    lines = [*unused.values(), *(f"different: {difference}" for difference in differences)]
    console.print_line("\n".join([*lines, f"going on from {found}, {promise}"]))


def quarantine(path: Path) -> None:
    """Give a file a name that is no checkpoint's, for whoever wants to look at it."""
    names = (path.with_name(f"{path.name}.unused-{number}") for number in itertools.count(1))
    with contextlib.suppress(OSError):
        path.rename(next(name for name in names if not name.exists()))


def print_summary(training: training_state.TrainingState, output: run_dir.RunDir) -> None:
    """Say what is about to be trained on what, and whether memory and disk are enough.

    Raises session.SaveError if not even one checkpoint would find room.
    """
    options, model = training.options, training.model
    n_tokens = sum(len(tokens) for tokens in training.batches.shards)
    needs = estimate(options)
    output.log(
        f"data      {options.data}: {n_tokens:,} tokens to train on, {len(training.held_out):,} held out, "
        f"{training.tokenizer.vocab_size:,} in the vocabulary\n"
        f"model     {model.n_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token, "
        f"on {training.device}{', deterministic' if options.deterministic else ''}\n"
        + (f"weights   of {options.init_from} to begin with\n" if options.init_from else "")
        + f"pieces    {swap.describe()}\n"
        f"{memory.describe(needs, options) if needs else UNKNOWN}\n"
        f"run       {output.folder}" + (f", from step {training.step}" if training.step else "")
    )
    there = memory.available(training.device)
    more = needs.total - needs.parameters if needs else 0
    if there is not None and more > there:
        output.log(f"warning: {more:,} bytes of memory are needed beside the weights, {there:,} are free")
    needed, free = training.checkpoint_bytes(), training_state.free_bytes(output.folder)
    n_kept = options.train.keep_checkpoints + 2  # the best, and the one that is being written
    if free < needed and options.train.on_save_error == "stop":
        raise training_state.SaveError(
            f"a checkpoint needs {needed:,} bytes, but {output.folder} has {free:,} free; free some, choose "
            "another --run_dir, or train without by --train.on_save_error warn"
        )
    if free < n_kept * needed:
        output.log(f"warning: {n_kept} checkpoints need {n_kept * needed:,} bytes, {free:,} are free")


def estimate(options: config.Config) -> memory.Estimate | None:
    """How much memory training will take; None where somebody's own pieces do not let that be known."""
    try:
        return memory.estimate(options, trainer.make_optimizer, trainer.batch_loss)
    except Exception:
        # any code may stand in a file of somebody's own
        if not swap.user_pieces():
            raise
        return None
