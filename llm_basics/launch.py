"""From options to a training run that can take its first step: data, model, directory, checkpoint."""

import dataclasses
from pathlib import Path

from llm_basics import checkpoint, config, device, followers, memory, prepare, run, session


def start(options: config.Config) -> tuple[session.Session, run.Run]:
    """Check and make everything that a run needs, and only then its directory.

    Raises ValueError or OSError for what cannot be done.
    """
    given = Path(options.run_dir or "")
    if options.run_dir and not options.resume and given.is_dir() and any(given.iterdir()):
        raise ValueError(f"--run_dir must be new or empty, got {given}; go on with a run by --resume {given}")
    if options.resume is not None and not run.checkpoints(options.resume):
        raise ValueError(f"--resume needs a checkpoint, but {options.resume} has none")
    device.choose(options.train.device)  # fails now, not after minutes of preparation
    prepared = prepare.prepare(options)
    model = dataclasses.replace(options.model, vocab_size=prepared.tokenizer.vocab_size)
    training = session.Session(dataclasses.replace(options, model=model), prepared)
    folder = options.resume or options.run_dir or run.make_folder(Path(options.config).stem)
    training.options = dataclasses.replace(training.options, run_dir=str(folder))
    output = run.Run(folder, tolerant=options.train.on_save_error == "warn")
    try:
        if options.resume is not None:
            go_on(training, output)
        output.followers.append(followers.Terminal(options.train.steps, training.step))
        output.write_config(dataclasses.asdict(training.options))
        training.tokenizer.save(output.folder / "tokenizer")
        if options.wandb:
            about = dataclasses.asdict(training.options)
            output.followers.append(followers.WandbFollower(output.folder, about))
    except BaseException:
        output.close()
        raise
    return training, output


def go_on(training: session.Session, output: run.Run) -> None:
    """Restore the newest checkpoint that is whole, and say what is not as it was."""
    found, rejected = checkpoint.newest_valid(output.checkpoints)
    lines = [f"not used: {reason}" for reason in rejected]
    if found is None:
        raise ValueError("--resume needs a whole checkpoint, but none is\n" + "\n".join(lines))
    differences = training.resume(found)
    # what is not whole must not count as one of the newest; it is kept for whoever wants to look at it
    for path in checkpoint.files(output.checkpoints):
        if path.name > found.name:
            path.rename(path.with_name(path.name + ".damaged"))
    output.resumed(training.step)
    lines += [f"different: {difference}" for difference in differences]
    promise = (
        "not to the last bit what it would have been" if differences else "bit for bit as if never stopped"
    )
    print("\n".join([*lines, f"going on from {found}, {promise}"]))


def introduce(training: session.Session, output: run.Run) -> None:
    """Say what is about to be trained on what, and whether memory and disk are enough.

    Raises session.SaveError if not even one checkpoint would find room.
    """
    options, model = training.options, training.model
    n_tokens = sum(len(tokens) for tokens in training.batches.shards)
    estimate = memory.estimate(options)
    output.say(
        f"data      {options.data}: {n_tokens:,} tokens to train on, {len(training.held_out):,} held out, "
        f"{training.tokenizer.vocab_size:,} in the vocabulary\n"
        f"model     {model.n_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token, "
        f"on {training.device}{', deterministic' if options.deterministic else ''}\n"
        f"{memory.explain(estimate, options)}\n"
        f"run       {output.folder}" + (f", from step {training.step}" if training.step else "")
    )
    there, more = memory.available(training.device), estimate.total - estimate.parameters
    if there is not None and more > there:
        output.say(f"warning: {more:,} bytes of memory are needed beside the weights, {there:,} are free")
    needed, free = training.checkpoint_bytes(), session.free_bytes(output.folder)
    n_kept = options.train.keep_checkpoints + 2  # the best, and the one that is being written
    if free < needed and options.train.on_save_error == "stop":
        raise session.SaveError(
            f"a checkpoint needs {needed:,} bytes, but {output.folder} has {free:,} free; free some, choose "
            "another --run_dir, or train without by --train.on_save_error warn"
        )
    if free < n_kept * needed:
        output.say(f"warning: {n_kept} checkpoints need {n_kept * needed:,} bytes, {free:,} are free")
