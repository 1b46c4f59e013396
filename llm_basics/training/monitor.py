"""Metrics of training steps: log lines, loss spikes and skipped steps.

On a GPU the next step is queued before the metrics of the previous one are read, so one result is pending.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llm_basics.core import dataloader, device, trainer
from llm_basics.runs import process, run_dir, stopwatch
from llm_basics.training import diagnostics, distributed
from llm_basics.training import state as training_state

# consecutive non-finite steps that may be skipped
MAX_SKIPPED = 10


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step with metrics on the device; `read` waits for loss and gradient norm."""

    step: int
    batches: Sequence[dataloader.Batch]
    result: trainer.StepResult
    observed: dict[str, float]
    random_state: list[Tensor]
    read: Callable[[], list[float]]


class Monitor:
    """Records the result of each step of a run; `accept` is the argument of `trainer.train_step`."""

    def __init__(self, state: training_state.TrainingState, output: run_dir.RunDir) -> None:
        self.state, self.output = state, output
        self.clock = stopwatch.Stopwatch()
        self.accept = self._accept if state.options.train.on_spike == "skip" else None
        self.pending: _Pending | None = None
        # at the start of the next step
        self.random_state = process.random_state(state.device)
        # steps since the last log line; consecutive skipped steps
        self.n_timed = self.n_skipped = 0

    def record(self, step: int, batches: Sequence[dataloader.Batch], result: trainer.StepResult) -> None:
        """Record a completed step.

        On a GPU this reads the metrics of the previous step. Raises as `skip` does if they are not finite.
        """
        before = self.pending
        self.pending = _Pending(
            step, batches, result, self.state.observed, self.random_state, start_reading(result)
        )
        self.random_state = process.random_state(self.state.device)
        if before is not None:
            self._settle(before)
        if result.train_loss.device.type not in device.ASYNCHRONOUS:
            self.flush()

    def flush(self) -> None:
        """Read and record the metrics of the pending step, if any."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self._settle(pending)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record the pending step, and exclude the time within the context from step times."""
        self.flush()
        with self.clock.paused():
            yield
        self.random_state = process.random_state(self.state.device)

    def skip(
        self, step: int, batches: Sequence[dataloader.Batch], error: FloatingPointError
    ) -> trainer.StepResult:
        """The result to record for a non-finite step, which left the weights unchanged.

        Restores the random state from before the step. Raises FloatingPointError with the origin of the first
        non-finite value, unless `on_nonfinite` is "skip" and few consecutive steps were skipped.
        """
        process.set_random_state(self.random_state, self.state.device)
        self._warn(step, self.random_state, batches, error)
        nan = torch.full((), math.nan)
        return trainer.StepResult(nan, nan, self.state.optimizer.param_groups[0]["lr"], updated=False)

    def _settle(self, pending: _Pending) -> None:
        """Check and record a step."""
        loss, norm = pending.read()
        result, step = pending.result, pending.step
        if result.updated:
            try:
                trainer.check_finite(step, result.lr, loss, norm)
            except FloatingPointError as error:
                # the weights are unchanged, but the next step may be running
                self._warn(step, pending.random_state, pending.batches, error)
                result, loss, norm = dataclasses.replace(result, updated=False), math.nan, math.nan
            if result.updated and self.accept is None:
                self._is_spike(step, loss)
        if math.isfinite(loss):
            self.n_skipped = 0
        self._log(pending, loss, norm, result)

    def _log(self, pending: _Pending, loss: float, norm: float, result: trainer.StepResult) -> None:
        """Log metrics if due, or if the step was skipped."""
        options, step = self.state.options.train, pending.step
        self.n_timed += 1
        if step % options.log_every and step not in (1, options.steps) and result.updated:
            return
        seconds = self.clock.lap() / self.n_timed
        self.n_timed = 0
        self.output.metrics(
            step,
            train_loss=loss,
            **pending.observed,
            lr=result.lr,
            grad_norm=norm,
            step_seconds=seconds,
            tokens_per_second=sum(inputs.numel() for inputs, *_ in pending.batches) / seconds,
            eta_seconds=(options.steps - step) * seconds,
        )

    # -- spikes -----------------------------------------------------------------------------------

    def _accept(self, loss: float) -> bool:
        return not self._is_spike(self.state.step + 1, loss)

    def _is_spike(self, step: int, loss: float) -> bool:
        """Whether a loss is a spike, with a warning if so."""
        spikes = self.state.spikes
        score = spikes.z_score(loss)
        if score <= spikes.threshold:
            return False
        skipped = "; the step is skipped" if self.accept is not None else ""
        self.output.event(step, "spike", loss=loss, z_score=score, skipped=bool(skipped))
        self.output.log(
            f"step {step}: loss spike, {loss:.4g} is {score:.0f} deviations above the recent median{skipped}"
        )
        return True

    # -- non-finite steps -------------------------------------------------------------------------

    def _warn(
        self,
        step: int,
        random_state: list[Tensor],
        batches: Sequence[dataloader.Batch],
        error: FloatingPointError,
    ) -> None:
        """Warn about a skipped step; raise FloatingPointError if training must stop."""
        model, options = self.state.model, self.state.options.train
        self.n_skipped += 1
        reason = f"{error}; {distributed.first_found(self._origin(random_state, batches), diagnostics.NONE)}"
        if options.on_nonfinite == "stop":
            raise FloatingPointError(reason)
        is_whole = all(torch.isfinite(p).all() for p in model.parameters())
        if self.n_skipped > MAX_SKIPPED or not is_whole:
            raise FloatingPointError(
                f"{reason}; skipping does not help, {self.n_skipped} consecutive steps failed"
            )
        self.output.event(step, "skipped", reason=reason)
        self.output.log(f"warning: {reason}; the step is skipped")

    def _origin(self, random_state: list[Tensor], batches: Sequence[dataloader.Batch]) -> str:
        """The origin of the first non-finite value in this process, found by repeating the step."""
        state, options = self.state, self.state.options.train
        if state.is_sharded:
            return "its origin is unknown with sharded weights; try --train.parallel ddp"
        now = process.random_state(state.device)

        def losses() -> Tensor:
            process.set_random_state(random_state, state.device)
            with device.precision(state.device, options.dtype):
                return torch.stack([state.batch_loss(batch) for batch in batches])

        process.set_random_state(random_state, state.device)
        state.optimizer.zero_grad(set_to_none=True)
        # gradients before clipping, which spreads non-finite values
        state.accumulate_gradients(batches)
        origin = diagnostics.find_nonfinite(state.model, losses)
        process.set_random_state(now, state.device)
        return origin


def start_reading(result: trainer.StepResult) -> Callable[[], list[float]]:
    """Start copying loss and gradient norm to the host; returns a function that waits for the copy."""
    loss, norm = result.train_loss, torch.as_tensor(result.grad_norm)
    if not loss.is_cuda:
        return lambda: [loss.item(), norm.item()]
    metrics = torch.stack([loss.float(), norm.reshape(()).to(loss.device, torch.float32)])
    copy = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=True)
    copy.copy_(metrics, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(loss.device))

    def read() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return read
