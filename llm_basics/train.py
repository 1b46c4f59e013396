"""Train a language model.

uv run python -m llm_basics.train                                   on the source code of Python's library
uv run python -m llm_basics.train --data book.txt --tokenizer bytes --train.steps 2000
"""

import os
import sys

from llm_basics import command_line, config, corpus

if __name__ == "__main__":
    # before torch is loaded, which takes seconds: --help and mistakes answer at once
    OPTIONS = command_line.train_options(sys.argv[1:])
    # threads that wait for each other let go of their core sooner, which beside other programs saves time
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import contextlib
import dataclasses
import signal
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import checkpoint, data, device, evaluate, followers, generate, optim, plot, prepare, run
from llm_basics import functional as F
from llm_basics import model as models

# inputs and targets; the batches of a step may differ in size
Batch = tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]

# --------------------------------------------------------------------------------------------------
# One step


@dataclass(frozen=True)
class StepResult:
    """What one step measured: the loss before the update, and the norm of the gradient before clipping."""

    train_loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    lr: float


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    step: int,
    options: config.TrainConfig,
) -> StepResult:
    """Update the weights once, on the mean loss over all targets of all `batches`; `step` counts from 1.

    Raises FloatingPointError, with the weights unchanged, where the gradient is not finite.
    """
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, options.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    n_targets = sum(targets.numel() for _, targets in batches)
    train_loss = torch.zeros((), device=batches[0][0].device)
    for inputs, targets in batches:
        # a batch counts by its targets: a mean of means would favor those of a smaller batch
        share = targets.numel() / n_targets
        with device.precision(inputs.device, options.dtype):
            loss = F.cross_entropy(F.widen(model(inputs)), targets, z_loss=options.z_loss) * share
        loss.backward()
        train_loss += loss.detach()
    try:
        grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm, error_if_nonfinite=True)
    except RuntimeError as error:
        raise FloatingPointError(f"step {step}, loss {train_loss.item()}, lr {lr:g}: {error}") from None
    optimizer.step()
    return StepResult(train_loss, grad_norm, lr)


def make_optimizer(model: nn.Module, options: config.TrainConfig) -> optim.AdamW:
    """AdamW that decays matrices and embeddings towards 0, but neither norms nor biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, options.lr, options.betas, options.eps, options.weight_decay)


# --------------------------------------------------------------------------------------------------
# All steps


class Session:
    """A training run as it stands: what `fit` works on and a checkpoint holds."""

    def __init__(self, options: config.Config, prepared: prepare.Prepared) -> None:
        train, model = options.train, options.model
        self.options = options
        self.tokenizer = prepared.tokenizer
        self.device = device.choose(train.device)
        texts = [shard.tokens for shard in prepared.train]
        self.held_out = prepared.val.tokens
        data.check_length(max(map(len, texts), default=0), model.context_length, "the training text")
        data.check_length(len(self.held_out), model.context_length, "the held-out text")
        self.batches = data.Batches(texts, train.batch_size, model.context_length, train.seed, self.device)
        self.token_bytes = evaluate.token_lengths(self.tokenizer, model.vocab_size).to(self.device)
        torch.manual_seed(train.seed)
        self.model = models.TransformerLM(model).to(self.device)
        self.optimizer = make_optimizer(self.model, train)
        self.prepared_in = prepared.folder.name
        self.step = 0
        self.stop_requested = False

    def batches_of_step(self, step: int) -> list[Batch]:
        """The batches whose gradients make up step number `step`."""
        n = self.options.train.grad_accumulation_steps
        return [self.batches[i] for i in range((step - 1) * n, step * n)]

    def evaluate(self, max_batches: int) -> dict[str, float]:
        """Loss and its relatives on the held-out text."""
        train, length = self.options.train, self.options.model.context_length
        batches = data.sequential_batches(self.held_out, train.batch_size, length, max_batches, self.device)
        with device.precision(self.device, train.dtype):
            return evaluate.evaluate(self.model, batches, self.token_bytes)

    def sample(self) -> tuple[str, str]:
        """A prompt, and how the model continues it."""
        train = self.options.train
        prompt = train.sample_prompt
        if prompt is None:
            prompt = opening_line(self.tokenizer.decode(self.held_out[:5000].tolist()))
        pieces = generate.complete(
            self.model, self.tokenizer, prompt, train.sample_tokens, temperature=0.8, seed=train.seed
        )
        return prompt, "".join(pieces)

    def save(self, path: Path) -> None:
        """Write everything that going on from here needs."""
        checkpoint.save_checkpoint(
            self.model,
            self.optimizer,
            self.step,
            path,
            config=dataclasses.asdict(self.options),
            data=self.prepared_in,
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError if it is damaged, or of another model or other data."""
        _, about = checkpoint.read_checkpoint(path)
        ours, theirs = dataclasses.asdict(self.options.model), about["config"]["model"]
        differences = [f"{k} was {theirs[k]}, now {ours[k]}" for k in ours if theirs.get(k) != ours[k]]
        if differences:
            raise ValueError(f"{path} is of another model: {'; '.join(differences)}")
        if about["data"] != self.prepared_in:
            raise ValueError(f"{path} was trained on {about['data']}, now the data is {self.prepared_in}")
        checkpoint.load_checkpoint(path, self.model, self.optimizer, restore_rng=True)
        self.step = about["step"]


def opening_line(text: str) -> str:
    """The first line that ends with a colon, and so asks for more, in code as in a play; else the first line.

    >>> opening_line("Act I.\\nROMEO:\\nIs the day so young?")
    'ROMEO:'
    """
    lines = [line for line in text.split(corpus.DOCUMENT_SEPARATOR)[0].splitlines() if line.strip()]
    return next((line for line in lines if line.endswith(":")), lines[0] if lines else "")


def fit(session: Session, output: run.Run) -> None:
    """Train to the last step, or until a stop is requested. On the way, record, evaluate, sample and save."""
    options = session.options.train
    watch = run.Stopwatch()
    timed_steps = 0
    session.model.train()
    while session.step < options.steps and not session.stop_requested:
        step = session.step + 1
        batches = session.batches_of_step(step)
        result = train_step(session.model, session.optimizer, batches, step, options)
        session.step = step
        timed_steps += 1
        if _due(step, options.log_every) or step in (1, options.steps):
            train_loss, grad_norm = result.train_loss.item(), result.grad_norm.item()
            seconds = watch.lap() / timed_steps
            output.metrics(
                step,
                train_loss=train_loss,
                lr=result.lr,
                grad_norm=grad_norm,
                tokens_per_second=sum(targets.numel() for _, targets in batches) / seconds,
                eta_seconds=(options.steps - step) * seconds,
            )
            timed_steps = 0
        if step < options.steps:
            with watch.paused():
                if _due(step, options.eval_every):
                    output.metrics(step, **session.evaluate(options.eval_batches))
                if _due(step, options.sample_every):
                    output.sample(step, *session.sample())
                if _due(step, options.checkpoint_every):
                    session.save(output.checkpoint_path(step))
    session.save(output.checkpoint_path(session.step))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# --------------------------------------------------------------------------------------------------
# The program


def start(options: config.Config) -> tuple[Session, run.Run]:
    """Check and make everything that a run needs, and only then its directory.

    Raises ValueError or OSError for what cannot be done.
    """
    given = Path(options.run_dir or "")
    if options.run_dir and not options.resume and given.is_dir() and any(given.iterdir()):
        raise ValueError(f"--run_dir must be new or empty, got {given}; go on with a run by --resume {given}")
    device.choose(options.train.device)  # fails now, not after minutes of preparation
    prepared = prepare.prepare(options)
    model = dataclasses.replace(options.model, vocab_size=prepared.tokenizer.vocab_size)
    session = Session(dataclasses.replace(options, model=model), prepared)
    if options.resume is not None:
        found = run.checkpoints(options.resume)
        if not found:
            raise ValueError(f"--resume needs a checkpoint, but {options.resume} has none")
        session.resume(found[0])
    folder = options.resume or options.run_dir or run.make_folder(Path(options.config).stem)
    session.options = dataclasses.replace(session.options, run_dir=str(folder))
    output = run.Run(folder, [followers.Terminal(options.train.steps, session.step)])
    output.write_config(dataclasses.asdict(session.options))
    session.tokenizer.save(output.folder / "tokenizer")
    if options.wandb:
        output.followers.append(followers.WandbFollower(output.folder, dataclasses.asdict(session.options)))
    return session, output


def introduce(session: Session, output: run.Run) -> None:
    """Say what is about to be trained on what."""
    options, model = session.options, session.model
    n_tokens = sum(len(tokens) for tokens in session.batches.shards)
    output.say(
        f"data      {options.data}: {n_tokens:,} tokens to train on, {len(session.held_out):,} held out, "
        f"{session.tokenizer.vocab_size:,} in the vocabulary\n"
        f"model     {model.n_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token, "
        f"on {session.device}\n"
        f"run       {output.folder}" + (f", from step {session.step}" if session.step else "")
    )


def conclude(session: Session, output: run.Run, steps: int, seconds: float) -> None:
    """Measure what was learned, and say where it is. This run made `steps` steps in `seconds`, all told."""
    options = session.options.train
    metrics = session.evaluate(10 * options.eval_batches)
    output.metrics(session.step, **metrics)
    output.sample(session.step, *session.sample())
    entropy = evaluate.unigram_entropy(session.held_out)
    figure = plot.plot_loss(output.folder, entropy)
    output.say(
        f"\n{steps} steps in {seconds:.0f} s\n"
        f"validation loss   {metrics['val_loss']:.3f} nats per token "
        f"(unigram entropy, which counting tokens would reach: {entropy:.3f})\n"
        f"perplexity        {metrics['perplexity']:.1f}\n"
        f"bits per byte     {metrics['bits_per_byte']:.3f}\n"
        f"accuracy          {metrics['accuracy']:.1%} of next tokens\n"
        f"loss curve        {figure}\n"
        f"checkpoint        {output.checkpoint_path(session.step)}\n"
        f"let it write      uv run python -m llm_basics.generate {output.folder}"
    )


@contextlib.contextmanager
def stop_on_interrupt(session: Session) -> Iterator[None]:
    """Inside, a first Ctrl-C lets the step end and the run be saved; a second one leaves at once."""

    def request_stop(number: int, frame: types.FrameType | None) -> None:
        session.stop_requested = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(options: config.Config) -> int:
    """Train as `options` say. Returns the exit status."""
    watch = run.Stopwatch()
    with command_line.exit_on_mistake():
        session, output = start(options)
    first_step = session.step
    try:
        introduce(session, output)
        with stop_on_interrupt(session):
            fit(session, output)
        if session.stop_requested:
            output.say(f"stopped after step {session.step}; go on with --resume {output.folder}")
            return 130
        conclude(session, output, session.step - first_step, watch.total())
    except FloatingPointError as error:
        output.say(f"error: {error}; the weights are as they were after step {session.step}")
        return 1
    finally:
        output.close()
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples may hold any character
    sys.exit(main(OPTIONS))
