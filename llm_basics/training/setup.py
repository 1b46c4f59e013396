"""Set up a training run from its options: data, model, run directory, checkpoint."""

import contextlib
import dataclasses
import errno
import itertools
from collections.abc import Callable
from pathlib import Path

from llm_basics import swap
from llm_basics.cli import nested
from llm_basics.core import config, evaluate, files, trainer
from llm_basics.data import prepare
from llm_basics.runs import checkpoint, console, loggers, process, run_dir, sharded_checkpoint, steering
from llm_basics.training import distributed, memory, parallel, warm_start
from llm_basics.training import state as training_state

# printed instead of an estimate
NOT_ESTIMATED = (
    "memory    not estimated: your code reads tensor values, and the estimate runs on fake tensors"
)

RECOMPUTED = "recomputed in the backward pass, by torch (CPU training kernels keep their activations)"


def of_text(options: config.Config) -> training_state.TrainingState:
    """The state of a run on plain text (pretraining)."""
    prepared = distributed.main_first(lambda: prepare.prepare(options))
    if options.resume is None and prepared.folder == Path(options.data):
        # a prepared folder contains its tokenizer
        options = dataclasses.replace(options, tokenizer=str(prepared.folder / "tokenizer"))
    model = dataclasses.replace(options.model, vocab_size=prepared.tokenizer.vocab_size)
    return training_state.TrainingState(dataclasses.replace(options, model=model), prepared)


def begin(
    options: config.Config, make: Callable[[config.Config], training_state.TrainingState]
) -> training_state.TrainingState:
    """The state from `make`, with the weights of --init_from for a new run."""
    if options.init_from is None or options.resume is not None:
        return make(options)
    warm_start.check(options, options.init_from)
    training = make(options)
    if training.adapters is None:
        warm_start.load_initial_weights(training.model, options.init_from)
    return training


def start(
    options: config.Config, make: Callable[[config.Config], training_state.TrainingState] = of_text
) -> tuple[training_state.TrainingState, run_dir.RunDir]:
    """Set up a run: all checks first, then the run directory. `make` loads the data and builds the model.

    Raises ValueError or OSError for invalid options or data, WriteError if the directory is not writable.
    """
    options = restarted(options)
    distributed.on_main(lambda: check_folder(options))
    if options.mine is not None:
        if options.resume and not Path(options.mine).exists():
            # the run directory contains a copy
            options = dataclasses.replace(options, mine=str(Path(options.resume) / "mine.py"))
        swap.use(str(options.mine))
    if distributed.strategy(options.train) == "mine" and parallel.OWN not in swap.user_pieces():
        raise ValueError(
            f"--train.parallel mine needs a class {parallel.OWN.split('.')[1]}, which {options.mine} lacks"
        )
    if options.fast != "off":
        swap.use("fast")
    memory.check(options, estimate)  # before minutes of data preparation
    training = begin(options, make)
    (folder,) = distributed.from_main([str(distributed.on_main(lambda: choose_folder(options)))])
    training.options = dataclasses.replace(training.options, run_dir=folder)
    output = distributed.main_first(lambda: open_folder(folder, options))
    try:
        if not training.is_compiled:
            sizes = training.options
            swap.prepare_model(training.model, sizes.train.batch_size, sizes.model.context_length)
        if options.resume is not None:
            resume_latest(training, output)
        elif options.replay is not None:
            start_replay(training, output, options.replay)
        training.parallelize()
        if training.is_compiled:
            compile_model(training)
        changes = steering.read_changes(output.folder)
        steps = [training.options.train.steps, *(c.value for c in changes if c.name == "train.steps")][-1]
        output.loggers.append(loggers.ConsoleLogger(steps, training.step))
        recorded = {
            run_dir.ORIGINS: swap.user_pieces(),
            run_dir.HELD_OUT: training.measured_on,
            run_dir.BASELINES: {"unigram entropy": evaluate.unigram_entropy(training.held_out)},
            run_dir.TRAINING_TOKENS: n_training_tokens(training),
        }
        output.write_config(dataclasses.asdict(training.options) | recorded)
        if not distributed.is_main():
            return training, output
        if options.mine is not None:
            files.write(output.folder / "mine.py", Path(options.mine).read_bytes())
        if options.resume is None:
            training.tokenizer.save(output.folder / "tokenizer")
        if options.wandb and not options.find_lr:
            about = dataclasses.asdict(training.options)
            output.loggers.append(loggers.WandbLogger(output.folder, about))
    except BaseException:
        output.close()
        raise
    return training, output


def restarted(options: config.Config) -> config.Config:
    """The options to resume with if torchrun has restarted a job with a checkpoint; else unchanged."""
    folder = options.resume or options.run_dir
    if not distributed.is_restarted() or folder is None or not _checkpoints(folder):
        return options
    saved = run_dir.load_options(folder, type(options)())
    return dataclasses.replace(saved, resume=str(folder))


def check_folder(options: config.Config) -> None:
    """Raise ValueError unless a new run has an empty folder, and a resumed run a checkpoint."""
    given = Path(options.run_dir or "")
    is_used = options.run_dir and not options.resume and given.is_dir() and any(given.iterdir())
    # a restarted job may have failed before its first checkpoint
    if is_used and not distributed.is_restarted():
        advice = f"resume the run with --resume {given}" if _checkpoints(given) else "or delete it"
        raise ValueError(f"--run_dir must be new or empty, got {given}; {advice}")
    if options.resume is not None and not _checkpoints(options.resume):
        raise ValueError(
            f"--resume needs a checkpoint, but {options.resume} has none; delete it and start again"
        )


def _checkpoints(folder: str | Path) -> list[Path]:
    return sharded_checkpoint.resumable(Path(folder) / run_dir.CHECKPOINTS)


def choose_folder(options: config.Config) -> str:
    """The run directory; created unless set in the options."""
    return str(options.resume or options.run_dir or run_dir.make_folder(Path(options.config).stem))


def open_folder(folder: str, options: config.Config) -> run_dir.RunDir:
    """The run directory, opened for writing in the main process."""
    if not distributed.is_main():
        return run_dir.ReadOnly(folder)
    output = run_dir.RunDir(folder, tolerant=options.train.on_save_error == "warn")
    checkpoint.delete_partial(output.checkpoints)
    if distributed.is_restarted() and options.resume is None:
        output.resumed(0)
    return output


def compile_model(training: training_state.TrainingState) -> None:
    """Compile the model with torch.compile; if that fails, warn and train without."""
    train = training.options.train
    state = process.random_state(training.device)
    console.print_line("compiling the model (usually less than a minute; disable with --train.compile off)")
    try:
        batch = training.next_batches()[0]
        # a CUDA graph is captured in the second call and replayed in the third
        for _ in range(3 if training.is_graph else 1):
            training.optimizer.zero_grad(set_to_none=True)
            trainer.accumulate_gradients(training.replica, [batch], train)
    except Exception as error:
        # a missing compiler, or any error of the toolchain
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        console.print_line(f"warning: the model could not be compiled ({reason}); training uncompiled")
        training.uncompile()
    training.optimizer.zero_grad(set_to_none=True)
    process.set_random_state(state, training.device)


def resume_latest(training: training_state.TrainingState, output: run_dir.RunDir) -> None:
    """Resume from the newest valid checkpoint of this run, and print changed options and environment."""
    unused = {}
    found = None
    before = run_dir.load_options(output.folder, type(training.options)())
    # options on the command line take precedence over recorded changes
    given = nested.differences(dataclasses.asdict(before), dataclasses.asdict(training.options))
    changes = [change for change in steering.read_changes(output.folder) if change.name not in given]
    changes = [change for change in changes if change.name in steering.REPLAYABLE]
    for path in sharded_checkpoint.resumable(output.checkpoints):
        try:
            if found is None:
                differences = training.resume(path, changes)
                found = path
            elif path.is_file():
                checkpoint.verify(path)
        except ValueError as error:
            unused[path] = f"not used: {error}"
    if found is None:
        raise ValueError("\n".join(["--resume needs a valid checkpoint of this run", *unused.values()]))
    if training.step > training.options.train.steps:
        raise ValueError(
            f"--train.steps must be at least {training.step}, the step of the run {output.folder}"
        )
    # an invalid checkpoint must not count as the newest or the best
    for path in unused if distributed.is_main() else ():
        quarantine(path)
    output.resumed(training.step, changed=training.changed, differences=differences)
    promise = "results may differ in the last bits" if differences else "bit for bit as if never stopped"
    lines = [*unused.values(), *(f"different: {difference}" for difference in differences)]
    console.print_line("\n".join([*lines, f"resuming from {found}, {promise}"]))


def start_replay(training: training_state.TrainingState, output: run_dir.RunDir, source: str) -> None:
    """Record the changes of the run in `source`, which `steering.Steering` then repeats."""
    if run_dir.read_held_out(source) not in (None, training.measured_on):
        raise ValueError(f"--replay needs the text and tokenizer of {source}, but they have changed")
    for change in steering.read_changes(source):
        output.event(change.step, "recorded", changed={change.name: [change.was, change.value]})


def quarantine(path: Path) -> None:
    """Rename an invalid checkpoint, so that it is ignored and kept for inspection."""
    names = (path.with_name(f"{path.name}.unused-{number}") for number in itertools.count(1))
    with contextlib.suppress(OSError):
        path.rename(next(name for name in names if not name.exists()))


def n_training_tokens(training: training_state.TrainingState) -> int:
    """Number of tokens of the training text."""
    return sum(len(tokens) for tokens in training.batches.shards)


def print_summary(training: training_state.TrainingState, output: run_dir.RunDir) -> None:
    """Print data, model and memory of a run, with warnings if memory or disk space is short.

    Raises NotEnoughMemory if memory is certainly insufficient, WriteError without space for a checkpoint.
    """
    options, model = training.options, training.model
    n_tokens = n_training_tokens(training)
    needs, available = estimate(options), memory.available(training.device)
    output.log(
        f"data      {options.data}: {n_tokens:,} training tokens, {len(training.held_out):,} held out, "
        f"vocabulary of {training.tokenizer.vocab_size:,}\n"
        f"model     {model.n_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token, "
        f"on {training.device}{', deterministic' if options.deterministic else ''}\n"
        + (f"weights   from {options.init_from}\n" if options.init_from else "")
        + (f"adapters  {training.adapters.describe(options.lora)}\n" if training.adapters else "")
        + f"pieces    {swap.describe()}\n"
        + (f"blocks    {RECOMPUTED}\n" if options.train.activation_checkpointing else "")
        + f"{memory.describe(needs, options, available) if needs else NOT_ESTIMATED}\n"
        f"run       {output.folder}" + (f", from step {training.step}" if training.step else "")
    )
    more = needs.resident - needs.parameters if needs else 0  # the weights are already allocated
    if needs and available is not None and more * memory.ERROR > available:
        if training.device.type == "cpu" and more > available * memory.ERROR:
            weights = needs.gradients + needs.optimizer
            raise memory.NotEnoughMemory(memory.refusal(int(more / memory.ERROR), weights, available))
        output.log(
            f"warning: about {more:,} bytes of memory are needed beside the weights, {available:,} are free"
        )
    needed, free = training.checkpoint_bytes(), files.free_bytes(output.folder)
    n_kept = options.train.keep_checkpoints + 2  # the best one, and the one being written
    if free < needed and options.train.on_save_error == "stop":
        raise files.WriteError(
            errno.ENOSPC,
            f"a checkpoint needs {needed:,} bytes, but {output.folder} has {free:,} free; free some, choose "
            "another --run_dir, or train without checkpoints by --train.on_save_error warn",
        )
    if free < n_kept * needed:
        output.log(f"warning: {n_kept} checkpoints need {n_kept * needed:,} bytes, {free:,} are free")


def estimate(options: config.Config) -> memory.Estimate | None:
    """Estimate the memory of training; None if user code cannot run on fake tensors."""
    per_process = options.train.batch_size // distributed.size()
    train = dataclasses.replace(options.train, batch_size=per_process)
    try:
        options = dataclasses.replace(options, train=train)
        return memory.estimate(options, trainer.make_optimizer, trainer.batch_loss)
    except Exception:
        # user code may raise any exception
        if not swap.user_pieces():
            raise
        return None
