"""The learning rate: linear warmup to the peak, half a cosine down to the minimum, then constant."""

import math

from llm_basics import swap
from llm_basics.learn import grids, probes

step = probes.Step("schedule")
cosine_schedule = swap.reference("optim.cosine_schedule")

# --------------------------------------------------------------------------------------------------
# Probes


def rates(steps, *settings):
    return lambda a: [float(a.run_get_lr_cosine_schedule(it, *settings)) for it in steps]


def diff(steps):
    """A function that describes the first step with a wrong rate."""

    def words(right, found):
        wrong = [
            i for i in range(len(steps)) if not math.isclose(right[i], found[i], rel_tol=1e-4, abs_tol=1e-6)
        ]
        text = f"at step {steps[wrong[0]]} the rate must be {right[wrong[0]]:.4g}, got {found[wrong[0]]:.4g}"
        return text + (f" ({len(wrong)} of {len(steps)} steps are wrong)" if len(wrong) > 1 else "")

    return words


def check(about, steps, settings, right, **ground):
    ground = ground or {"contract": "schedule"}
    step.value(about, rates(steps, *settings), right, rtol=1e-5, atol=1e-7, words=diff(steps), **ground)


# peak, floor, warm-up, total
SETTINGS = (3.0, 0.5, 4, 10)
ROOT = math.sqrt(3) / 2

check("warmup of 4 steps to 3.0", [0, 1, 2, 3], SETTINGS, [0.0, 0.75, 1.5, 2.25])
check(
    "half a cosine from 3.0 at step 4 to 0.5 at step 10",
    [4, 5, 6, 7, 8, 9, 10],
    SETTINGS,
    [3.0, 1.75 + 1.25 * ROOT, 2.375, 1.75, 1.125, 1.75 - 1.25 * ROOT, 0.5],
)
check("after the end, at step 10", [10, 11, 13, 16, 22, 1000], SETTINGS, [0.5] * 6)
check("a minimum of 0", [4, 7, 9, 10, 12], (3.0, 0.0, 4, 10), [3.0, 1.5, 1.5 - 1.5 * ROOT, 0.0, 0.0])
check(
    "no warmup",
    [0, 1, 3, 6, 7],
    (3.0, 0.5, 0, 6),
    [3.0, 1.75 + 1.25 * ROOT, 1.75, 0.5, 0.5],
    beyond="a run that resumes has no warmup; the public test has one, and a division by it must not fail",
)
check(
    "warmup only",
    [0, 5, 9, 11],
    (3.0, 0.5, 10, 10),
    [0.0, 1.5, 2.7, 0.5],
    beyond="a short trial may end with its warmup; in the public test a cosine follows",
)
step.value(
    "a schedule that ends with its warmup has the peak or the minimum there",
    lambda a: float(a.run_get_lr_cosine_schedule(10, 3.0, 0.5, 10, 10)) in (3.0, 0.5),
    True,
    beyond="the assignment leaves open which of the two it is; a division by 0 is neither",
)

# --------------------------------------------------------------------------------------------------
# Mistakes: the warm-up


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def warm_up_one_step_ahead(step, max_lr, min_lr, warmup_steps, total_steps):
    """Warmup counts from step + 1, so step 0 has a rate above 0, and the peak comes one step early. Warmup
    starts at 0 here: max_lr * step / warmup_steps."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def warm_up_from_the_floor(step, max_lr, min_lr, warmup_steps, total_steps):
    """Warmup rises from min_lr instead of 0. min_lr is for the end of training; the first steps, before
    AdamW's moments are reliable, start from 0."""
    if step < warmup_steps:
        return min_lr + (max_lr - min_lr) * step / warmup_steps
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def warm_up_to_the_floor_only(step, max_lr, min_lr, warmup_steps, total_steps):
    """Warmup rises to min_lr only, and then jumps to the peak. It must end where the cosine begins: multiply
    max_lr by step / warmup_steps."""
    if step < warmup_steps:
        return min_lr * step / warmup_steps
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def warm_up_over_the_whole_length(step, max_lr, min_lr, warmup_steps, total_steps):
    """Warmup divides by total_steps instead of warmup_steps, so the rate rises too slowly and jumps to the
    peak where the cosine begins."""
    if step < warmup_steps:
        return max_lr * step / total_steps
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def no_warm_up(step, max_lr, min_lr, warmup_steps, total_steps):
    """There is no warmup: the rate is at the peak until the cosine begins, so the first steps, whose moment
    estimates are unreliable, are the longest. Rise linearly from 0."""
    return cosine_schedule(max(step, warmup_steps), max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def warm_up_along_a_cosine(step, max_lr, min_lr, warmup_steps, total_steps):
    """Warmup follows a cosine instead of a line. Both ends are right, but the rate is too low in the first
    half and too high in the second. Use max_lr * step / warmup_steps."""
    if step < warmup_steps:
        return max_lr * 0.5 * (1 - math.cos(math.pi * step / warmup_steps))
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def division_by_no_warm_up(step, max_lr, min_lr, warmup_steps, total_steps):
    """step / warmup_steps is always computed, which fails if warmup_steps is 0. Divide only if step is below
    warmup_steps."""
    warmed = min(1.0, step / warmup_steps)
    return warmed * max_lr if warmed < 1 else cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


# --------------------------------------------------------------------------------------------------
# Mistakes: the cosine


def cosine(progress, max_lr, min_lr):
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def with_cosine(step, max_lr, min_lr, warmup_steps, total_steps, fall):
    """The schedule with another decay: `fall(steps since the warm-up, steps of the cosine)`."""
    if warmup_steps < step < total_steps:
        return fall(step - warmup_steps, total_steps - warmup_steps)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def cosine_over_the_whole_length(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine counts from step 0, as if there were no warmup, so the rate drops suddenly where warmup
    ends. Progress is (step - warmup_steps) / (total_steps - warmup_steps)."""
    if warmup_steps <= step <= total_steps:
        return cosine(step / total_steps, max_lr, min_lr)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def progress_divided_by_the_whole_length(step, max_lr, min_lr, warmup_steps, total_steps):
    """The steps since warmup are divided by total_steps, so the cosine does not reach min_lr, and the rate
    drops to it at the end. Divide by total_steps - warmup_steps."""
    return with_cosine(
        step,
        max_lr,
        min_lr,
        warmup_steps,
        total_steps,
        lambda i, n: cosine(i / total_steps, max_lr, min_lr),
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def total_counted_without_warm_up(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine covers total_steps after warmup, so the run ends before min_lr is reached. total_steps
    includes warmup; the cosine has total_steps - warmup_steps."""
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, warmup_steps + total_steps)


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def rises_again_after_the_end(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine does not stop at total_steps, so the rate rises again if training continues. Return min_lr
    from total_steps on."""
    if step <= total_steps:
        return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)
    return cosine((step - warmup_steps) / max(1, total_steps - warmup_steps), max_lr, min_lr)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def starts_over_after_the_end(step, max_lr, min_lr, warmup_steps, total_steps):
    """After total_steps the schedule restarts with another warmup and peak. Here the rate stays at min_lr;
    look for a remainder (%) of the step."""
    if step <= total_steps:
        return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)
    return cosine_schedule(step % total_steps, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def zero_after_the_end(step, max_lr, min_lr, warmup_steps, total_steps):
    """The rate is 0 after total_steps, so further training has no effect. It must stay at min_lr."""
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps) if step <= total_steps else 0.0


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def peak_after_the_end(step, max_lr, min_lr, warmup_steps, total_steps):
    """After total_steps the rate is back at the peak, which undoes the effect of the decay. It must stay at
    min_lr."""
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps) if step <= total_steps else max_lr


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def floor_ignored(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine decays to 0 instead of min_lr, so the last part of training has almost no effect. Scale the
    cosine by max_lr - min_lr, and add min_lr."""
    return cosine_schedule(step, max_lr, 0.0, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="public solutions of CS336")
def floor_fixed_at_a_tenth(step, max_lr, min_lr, warmup_steps, total_steps):
    """The rate falls to a tenth of the peak, whatever min_lr is. That is the usual choice, but the caller
    makes it: use the argument."""
    return cosine_schedule(step, max_lr, max_lr / 10, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def floor_reached_at_the_end_only(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine decays from the peak to 0, and the rate jumps up to min_lr at total_steps. Scale the cosine
    by max_lr - min_lr, and add min_lr."""
    return with_cosine(
        step, max_lr, min_lr, warmup_steps, total_steps, lambda i, n: cosine(i / n, max_lr, 0.0)
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def floor_added_on_top(step, max_lr, min_lr, warmup_steps, total_steps):
    """min_lr is added to a cosine of amplitude max_lr, so the rate starts above max_lr. The amplitude is
    max_lr - min_lr."""
    if warmup_steps <= step < total_steps:
        return min_lr + cosine_schedule(step, max_lr, 0.0, warmup_steps, total_steps)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def floor_as_a_lower_bound(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine decays to 0 and is bounded from below by min_lr with max(), so the rate is too low before it
    and flat too early. The cosine itself must end at min_lr."""
    return with_cosine(
        step,
        max_lr,
        min_lr,
        warmup_steps,
        total_steps,
        lambda i, n: max(min_lr, cosine(i / n, max_lr, 0.0)),
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def straight_line_down(step, max_lr, min_lr, warmup_steps, total_steps):
    """The rate decays linearly. Both ends are right, but it is too low in the first half and too high in the
    second. Use 0.5 * (1 + cos(pi * progress))."""
    return with_cosine(
        step, max_lr, min_lr, warmup_steps, total_steps, lambda i, n: max_lr + (min_lr - max_lr) * i / n
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def quarter_of_a_cosine(step, max_lr, min_lr, warmup_steps, total_steps):
    """The angle ends at pi / 2, a quarter of a period, so the rate falls fastest at the very end. The decay
    is half a period, to pi, with 0.5 * (1 + cos)."""
    return with_cosine(
        step,
        max_lr,
        min_lr,
        warmup_steps,
        total_steps,
        lambda i, n: min_lr + (max_lr - min_lr) * math.cos(math.pi / 2 * i / n),
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def whole_cosine(step, max_lr, min_lr, warmup_steps, total_steps):
    """The angle ends at 2 pi, a whole period, so the rate is lowest in the middle and back at the peak at the
    end. The decay is half a period, to pi."""
    return with_cosine(
        step, max_lr, min_lr, warmup_steps, total_steps, lambda i, n: cosine(2 * i / n, max_lr, min_lr)
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def pi_forgotten(step, max_lr, min_lr, warmup_steps, total_steps):
    """The factor pi is missing in the cosine, so the angle ends at 1 instead of pi, and the rate drops to
    min_lr only at the last step."""
    return with_cosine(
        step, max_lr, min_lr, warmup_steps, total_steps, lambda i, n: cosine(i / n / math.pi, max_lr, min_lr)
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def half_forgotten(step, max_lr, min_lr, warmup_steps, total_steps):
    """The factor 0.5 is missing: 1 + cos goes from 2 to 0, so the rate starts at twice its height above
    min_lr."""
    if warmup_steps <= step < total_steps:
        return cosine_schedule(step, 2 * max_lr - min_lr, min_lr, warmup_steps, total_steps)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def cosine_without_the_one(step, max_lr, min_lr, warmup_steps, total_steps):
    """The cosine is used without adding 1, so it goes from 1 to -1, and the rate falls below min_lr. Use 0.5
    * (1 + cos(pi * progress))."""
    return with_cosine(
        step,
        max_lr,
        min_lr,
        warmup_steps,
        total_steps,
        lambda i, n: min_lr + (max_lr - min_lr) * math.cos(math.pi * i / n),
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def cosine_upward(step, max_lr, min_lr, warmup_steps, total_steps):
    """After warmup the rate drops to min_lr and then rises to the peak: it is 1 - cos instead of 1 + cos, or
    peak and minimum are swapped."""
    if warmup_steps <= step < total_steps:
        return cosine_schedule(step, min_lr, max_lr, warmup_steps, total_steps)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def whole_number_division(step, max_lr, min_lr, warmup_steps, total_steps):
    """Progress is computed with //, which is 0 until the end, so the rate stays at the peak and then drops to
    min_lr. Divide with /."""
    return with_cosine(
        step, max_lr, min_lr, warmup_steps, total_steps, lambda i, n: cosine(i // n, max_lr, min_lr)
    )


@step.mistake("optim.cosine_schedule", source="written for this catalogue")
def division_by_no_cosine(step, max_lr, min_lr, warmup_steps, total_steps):
    """If warmup covers all steps, total_steps - warmup_steps is 0, and the division fails at the end. Return
    min_lr from total_steps on, before dividing."""
    if step == total_steps:
        return cosine((step - warmup_steps) / (total_steps - warmup_steps), max_lr, min_lr)
    return cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("optim.cosine_schedule", [0.0, *grids.powers(1e-6, 10)])
def floor_fixed_at_a_number(value):
    """The cosine ends at {value}, whatever min_lr is passed, and the rate stays there. Scale the cosine by
    max_lr - min_lr, and add min_lr."""
    return lambda step, max_lr, min_lr, warmup_steps, total_steps: cosine_schedule(
        step, max_lr, value, warmup_steps, total_steps
    )


@step.family("optim.cosine_schedule", range(1, 101))
def warm_up_of_a_fixed_length(value):
    """Warmup takes {value} steps, whatever warmup_steps is passed. Divide by warmup_steps, and let the cosine
    begin there."""
    return lambda step, max_lr, min_lr, warmup_steps, total_steps: cosine_schedule(
        step, max_lr, min_lr, value, total_steps
    )


@step.family("optim.cosine_schedule", [i for i in range(-20, 21) if i])
def steps_offset_by_a_number(value):
    """The rate at each step is that of {value} steps later. Step 0 is the first, with a rate of 0 if there is
    warmup; use the step as it is passed."""
    return lambda step, max_lr, min_lr, warmup_steps, total_steps: cosine_schedule(
        max(0, step + value), max_lr, min_lr, warmup_steps, total_steps
    )


step.factor("optim.cosine_schedule")
