"""Distillation: divergences of a student from a teacher, their temperature, masked means, hard labels."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.learn import probes

step = probes.Step("distillation")
draw = probes.numbers(seed=110)

STUDENT, TEACHER = 2 * draw(3, 5, 7), 2 * draw(3, 5, 7)
LABELS = torch.tensor([[0, 3, 6, 2, 1], [5, 5, 0, 4, 2], [1, 6, 3, 3, 0]])
MASK = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
EMPTY = torch.zeros_like(MASK)
IMPOSSIBLE = torch.arange(7) == 3


def expected(student, teacher, direction="forward", temperature=1.0):
    """By torch's own divergence, whose first argument is the second distribution."""
    q, p = (tF.log_softmax(x / temperature, -1) for x in (student, teacher.detach()))
    second, first = (q, p) if direction == "forward" else (p, q)
    return tF.kl_div(second, first, reduction="none", log_target=True).sum(-1) * temperature**2


def expected_loss(student, mask=MASK, direction="forward", temperature=1.0, hard_weight=0.0):
    soft = expected(student, TEACHER, direction, temperature)
    hard = tF.cross_entropy(student.mT, LABELS, reduction="none")
    return ((1 - hard_weight) * soft + hard_weight * hard)[mask.bool()].mean()


# --------------------------------------------------------------------------------------------------
# Probes


def compare_divergence(about, *choices, student=STUDENT, teacher=TEACHER, **more):
    step.compare(
        about,
        lambda a, student: a.run_kl_divergence(student, teacher, *choices),
        lambda student: expected(student, teacher, *choices),
        {"student": student},
        axes="row position",
        **more,
    )


compare_divergence("from teacher to student", "forward")
compare_divergence("from teacher to student, temperature 3", "forward", 3.0)
compare_divergence("from student to teacher", "reverse")
compare_divergence("from student to teacher, temperature 2", "reverse", 2.0)
step.compare(
    "student and teacher equal",
    lambda a, student: a.run_kl_divergence(student, student.detach().clone(), "forward", 2.0),
    lambda student: expected(student, student, "forward", 2.0),
    {"student": STUDENT},
    axes="row position",
)
compare_divergence("logits around 1000", "forward", student=1000 + 60 * STUDENT, atol=1e-3)
compare_divergence("reverse, logits around 1000", "reverse", student=1000 + 60 * STUDENT, atol=1e-3)

for direction in ("forward", "reverse"):
    step.compare(
        f"{direction}: a teacher of the same weights has no gradient",
        lambda a, student, direction=direction: a.run_kl_divergence(student, 2 * student, direction),
        lambda student, direction=direction: expected(student, 2 * student, direction),
        {"student": STUDENT},
        axes="row position",
    )


def impossible(function, direction):
    """A token that both models exclude; where the student's logit is -inf there is no gradient to compare."""

    def run(student):
        masked = student.masked_fill(IMPOSSIBLE, -torch.inf)
        return function(masked, TEACHER.masked_fill(IMPOSSIBLE, -torch.inf), direction)

    return run


def without(student, teacher, direction):
    return expected(student[..., ~IMPOSSIBLE], teacher[..., ~IMPOSSIBLE], direction)


for direction in ("forward", "reverse"):
    step.compare(
        f"{direction}: a token that both exclude",
        lambda a, student, direction=direction: impossible(a.run_kl_divergence, direction)(student),
        impossible(without, direction),
        {"student": STUDENT},
        axes="row position",
    )
step.compare(
    "logits in bfloat16",
    lambda a, student: a.run_kl_divergence(student, TEACHER.bfloat16(), "forward", 2.0),
    lambda student: expected(student.float(), TEACHER.bfloat16().float(), "forward", 2.0),
    {"student": STUDENT.bfloat16()},
    axes="row position",
    gradients=False,
)


def refused(*arguments):
    def run(a):
        try:
            a.run_kl_divergence(*arguments)
        except ValueError:
            return "ValueError"
        return "no error"

    return run


step.value("an unknown direction", refused(STUDENT, TEACHER, "sideways"), "ValueError")
step.value("a temperature of 0", refused(STUDENT, TEACHER, "forward", 0.0), "ValueError")
step.value("vocabularies of 7 and of 1", refused(STUDENT, TEACHER[..., :1]), "ValueError")


def compare_loss(about, mask=MASK, labels=LABELS, reference=None, **choices):
    step.compare(
        about,
        lambda a, student: a.run_distillation_loss(student, TEACHER, labels, mask, **choices),
        reference or (lambda student: expected_loss(student, mask, **choices)),
        {"student": STUDENT},
    )


compare_loss("the mean over the mask")
compare_loss("reverse, temperature 2", direction="reverse", temperature=2.0)
compare_loss("a tenth of hard labels", hard_weight=0.1)
compare_loss("hard labels at temperature 3", hard_weight=0.4, temperature=3.0)
compare_loss("hard labels alone", hard_weight=1.0, temperature=3.0)
compare_loss("a mask of booleans", mask=MASK.bool())
compare_loss(
    "labels of -100 where they are masked",
    labels=LABELS.masked_fill(MASK == 0, -100),
    reference=lambda student: expected_loss(student, hard_weight=0.5),
    hard_weight=0.5,
)
compare_loss("an empty mask", mask=EMPTY, reference=lambda student: (student * 0).sum())


# --------------------------------------------------------------------------------------------------
# Mistakes of the divergence


def register(piece, name, function, explanation, source="written for this catalogue", same_as=None):
    function.__name__, function.__doc__ = name, explanation
    step.mistake(f"distillation.{piece}", source=source, same_as=same_as)(function)


def wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def terms(first, second):
    """p (log p - log q), 0 where p is 0."""
    is_impossible = first == -torch.inf
    return first.exp() * (first.masked_fill(is_impossible, 0.0) - second.masked_fill(is_impossible, 0.0))


def divergence_with(
    student=lambda x: x,
    teacher=lambda x: x.detach(),
    student_temperature=lambda t: t,
    teacher_temperature=lambda t: t,
    log_softmax=lambda x: torch.log_softmax(x, -1),
    direction=lambda direction: direction,
    each=terms,
    reduce=lambda terms: terms.sum(-1),
    factor=lambda t: t**2,
    widen=wide,
    directions=("forward", "reverse"),
    checks_temperature=True,
    checks_vocabulary=True,
):
    """The divergence with something wrong in it."""

    def kl_divergence(student_logits, teacher_logits, direction_="forward", temperature=1.0):
        if checks_vocabulary and student_logits.shape[-1] != teacher_logits.shape[-1]:
            raise ValueError("student and teacher must have one vocabulary")
        if checks_temperature and temperature <= 0:
            raise ValueError("temperature must be above 0")
        if directions and direction_ not in directions:
            raise ValueError("direction must be 'forward' or 'reverse'")
        log_q = log_softmax(student(widen(student_logits)) / student_temperature(temperature))
        log_p = log_softmax(teacher(widen(teacher_logits)) / teacher_temperature(temperature))
        # the order of two distributions, most often teacher and student
        pair = (log_q, log_p) if direction(direction_) == "reverse" else (log_p, log_q)
        return factor(temperature) * reduce(each(*pair))

    def with_names(student_logits, teacher_logits, direction="forward", temperature=1.0):
        return kl_divergence(student_logits, teacher_logits, direction, temperature)

    return with_names


def kl_mistake(name, explanation, source="written for this catalogue", same_as=None, **changes):
    register("kl_divergence", name, divergence_with(**changes), explanation, source, same_as)


kl_mistake(
    "factor_of_the_temperature_missing",
    """The factor T^2 is missing. Gradients of soft targets shrink with 1 / T^2: at a temperature of 4 the
    teacher counts a sixteenth, and the hard labels beside it decide. Multiply by T^2.""",
    source="the usual first version",
    factor=lambda t: 1.0,
)
kl_mistake(
    "temperature_not_squared",
    """The divergence is multiplied by T, not by T^2. The logits are divided by T, and so is the derivative
    of the result once more: two factors of 1 / T.""",
    factor=lambda t: t,
)
kl_mistake(
    "divided_by_the_square",
    """The divergence is divided by T^2 instead of multiplied, which makes small gradients smaller still. The
    factor is to make up for the temperature.""",
    factor=lambda t: t**-2,
)
kl_mistake(
    "temperature_of_the_teacher_alone",
    """Only the teacher's logits are divided by the temperature. The student then learns the softened
    probabilities as its own, and always generates at that temperature. Divide both.""",
    student_temperature=lambda t: 1.0,
)
kl_mistake(
    "temperature_of_the_student_alone",
    """Only the student's logits are divided by the temperature. It then learns logits T times as large as
    the teacher's, and is far too certain. Divide both.""",
    teacher_temperature=lambda t: 1.0,
)
kl_mistake(
    "multiplied_by_the_temperature",
    """The logits are multiplied by the temperature. A high one makes the targets sharper then, not softer,
    until only the likeliest token is left. Divide.""",
    student_temperature=lambda t: 1 / t,
    teacher_temperature=lambda t: 1 / t,
)
kl_mistake(
    "directions_exchanged",
    """Forward and reverse are exchanged. Forward is the expectation under the teacher, which spreads the
    student over all that the teacher would write; reverse is that under the student.""",
    direction=lambda direction: {"forward": "reverse", "reverse": "forward"}[direction],
)
kl_mistake(
    "arguments_of_kl_div_exchanged",
    """torch's kl_div(input, target) is the divergence from target to input, so the teacher is the target for
    forward. With the arguments in the order of the formula both directions are exchanged.""",
    source="public issues of torch and trl",
    same_as="directions_exchanged",
    each=lambda first, second: terms(second, first),
)
kl_mistake(
    "always_forward",
    """The argument is ignored: the direction is always forward. A run with reverse, to ignore texts that a
    small model cannot learn, trains on the other divergence.""",
    direction=lambda direction: "forward",
)
kl_mistake(
    "always_reverse",
    """The argument is ignored: the direction is always reverse. A student then learns the likeliest answers
    of the teacher and drops the others.""",
    direction=lambda direction: "reverse",
)
kl_mistake(
    "mean_of_both_directions",
    """The mean of both divergences is computed, whatever the direction. That is Jeffreys' divergence,
    another method. Compute the one of `direction`.""",
    each=lambda first, second: (terms(first, second) + terms(second, first)) / 2,
)
kl_mistake(
    "divergence_from_the_mixture",
    """The divergence is that from the mean of both distributions, a half of Jensen and Shannon's. It is
    bounded by log 2 and has hardly a gradient where the models differ most.""",
    source="generalized knowledge distillation (arXiv 2306.13649), taken for KL",
    each=lambda first, second: terms(first, torch.logaddexp(first, second) - math.log(2)),
)
kl_mistake(
    "teacher_with_a_gradient",
    """A gradient flows into the teacher. If both share weights, as in self-distillation or with an adapter,
    the teacher is pulled to the student. Detach its logits.""",
    teacher=lambda x: x,
)
kl_mistake(
    "student_detached",
    """The student's logits are detached, so the loss has the right value and no gradient. Detach the
    teacher's alone.""",
    student=lambda x: x.detach(),
)
kl_mistake(
    "entropy_left_out",
    """The result is the cross-entropy -sum p log q, without the entropy of the first distribution. It is not
    0 for equal models, and in reverse its gradient is another one: the student collapses to one token.""",
    each=lambda first, second: -first.exp() * second.masked_fill(first == -torch.inf, 0.0),
)
kl_mistake(
    "sign_of_the_divergence",
    """The sign is wrong: the result is at most 0, and minimizing it drives the student away from the
    teacher. A divergence is at least 0.""",
    each=lambda first, second: -terms(first, second),
)
kl_mistake(
    "mean_over_the_vocabulary",
    """The terms are averaged over the vocabulary, as by reduction "mean" of torch's kl_div. The loss is
    smaller by a factor of 50,000 for GPT-2. Sum over the tokens.""",
    source="the documentation of torch.nn.KLDivLoss warns of it",
    reduce=lambda terms: terms.mean(-1),
)
kl_mistake(
    "probabilities_compared",
    """The squared difference of the probabilities is summed. Rare tokens then count for nothing, though they
    are what a teacher adds to a label. Use the divergence.""",
    each=lambda first, second: (first.exp() - second.exp()).square(),
)
kl_mistake(
    "weights_left_out",
    """The differences of the log-probabilities are summed without the weights p. A token that no model would
    write counts as much as the likeliest. Multiply by exp(log p).""",
    each=lambda first, second: first - second,
)
kl_mistake(
    "logarithm_of_a_rounded_softmax",
    """log(softmax(x)) is computed in two steps. Probabilities below 1e-45 round to 0, and the divergence is
    infinite or NaN. Use a log-softmax.""",
    log_softmax=lambda x: torch.softmax(x, -1).log(),
)
kl_mistake(
    "logarithm_of_a_clamped_softmax",
    """The probabilities are clamped to 1e-8 before the logarithm. A token that the student excludes wrongly
    has no gradient then, and is never learned. Use a log-softmax.""",
    log_softmax=lambda x: torch.softmax(x, -1).clamp(min=1e-8).log(),
)
kl_mistake(
    "impossible_token_makes_nan",
    """A token with the logit -inf in both models gives 0 times (-inf + inf), NaN. Masked vocabularies have
    such tokens. Replace the term by 0 where the first probability is 0.""",
    each=lambda first, second: first.exp() * (first - second),
)
kl_mistake(
    "computed_in_half_precision",
    """bfloat16 logits stay in bfloat16. Differences of log-probabilities of 8 bits are mostly rounding, and
    so is the divergence of two models that are close. Convert to float32 first.""",
    widen=lambda x: x,
)
kl_mistake(
    "logarithm_to_base_two",
    """The divergence is in bits, with logarithms to base 2, while the cross-entropy beside it is in nats.
    Use natural logarithms.""",
    reduce=lambda terms: terms.sum(-1) / math.log(2),
)
kl_mistake(
    "unknown_direction_is_forward",
    """A direction that is not known is taken as forward, without an error. A misspelled option changes the
    method, and nothing shows it. Raise ValueError.""",
    directions=(),
)
kl_mistake(
    "temperature_of_zero",
    """A temperature of 0 is not refused. The logits become infinite, and the loss NaN or 0. Raise ValueError
    unless it is above 0.""",
    checks_temperature=False,
)
kl_mistake(
    "vocabularies_not_compared",
    """Logits of different vocabularies are not refused where they can be broadcast. Token 3 of one model is
    not token 3 of the other. Raise ValueError.""",
    checks_vocabulary=False,
)

# --------------------------------------------------------------------------------------------------
# Mistakes of the loss


def masked_mean(each, mask):
    return each.masked_fill(mask == 0, 0.0).sum() / (mask != 0).sum().clamp(min=1)


def loss_with(
    mean=masked_mean,
    mix=lambda soft, hard, w: (1 - w) * soft + w * hard,
    hard_temperature=lambda t: 1.0,
    direction_of=lambda direction: direction,
    temperature_of=lambda t: t,
    teacher=lambda logits: logits,
    labels_of=lambda labels, mask: labels.masked_fill(mask == 0, 0),
    student_of=lambda logits: logits,
):
    """The loss with something wrong in it."""

    def distillation_loss(
        student_logits, teacher_logits, labels, mask, direction="forward", temperature=1.0, hard_weight=0.0
    ):
        soft = divergence_with()(
            student_logits, teacher(teacher_logits), direction_of(direction), temperature_of(temperature)
        )
        log_q = torch.log_softmax(student_of(student_logits) / hard_temperature(temperature), -1)
        hard = -log_q.gather(-1, labels_of(labels, mask)[..., None])[..., 0]
        return mean(mix(soft, hard, hard_weight), mask)

    return distillation_loss


for name, explanation, changes in (
    (
        "mask_ignored",
        """The mask is not used: prompt and padding are inside the mean. The student learns what the teacher
        makes of padding. Average where the mask is 1.""",
        {"mean": lambda each, mask: each.mean()},
    ),
    (
        "mean_over_the_whole_width",
        """The masked sum is divided by all positions, so the loss and its gradient depend on how much
        padding the batch has. Divide by the sum of the mask.""",
        {"mean": lambda each, mask: (each * mask).mean()},
    ),
    (
        "mean_of_the_sequences",
        """The mean of each sequence is averaged. A token of a short response then counts more than one of a
        long response. Average over all tokens of the mask at once.""",
        {"mean": lambda each, mask: ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()},
    ),
    (
        "sum_over_the_tokens",
        """The divergences are summed, not averaged. The gradient grows with the batch, and the learning rate
        with it. Divide by the number of tokens.""",
        {"mean": lambda each, mask: (each * mask).sum()},
    ),
    (
        "sum_over_the_rows_only_divided",
        """The sum is divided by the number of sequences ("batchmean" of torch's kl_div), not of tokens. Long
        sequences have large losses. Divide by the sum of the mask.""",
        {"mean": lambda each, mask: (each * mask).sum() / len(mask)},
    ),
    (
        "empty_mask_makes_nan",
        """The mean of no token is 0 / 0. A batch whose responses were all cut off makes the weights NaN.
        Divide by at least 1.""",
        {"mean": lambda each, mask: (each * mask).sum() / mask.sum()},
    ),
    (
        "weights_exchanged",
        """hard_weight weights the divergence, and 1 - w the labels. With the default of 0 the teacher has no
        influence at all: this is plain training. Exchange them.""",
        {"mix": lambda soft, hard, w: w * soft + (1 - w) * hard},
    ),
    (
        "hard_labels_ignored",
        """hard_weight is not used, the loss is the divergence alone. A teacher's errors are then learned
        with nothing to correct them. Mix in the labels.""",
        {"mix": lambda soft, hard, w: soft},
    ),
    (
        "weights_do_not_add_up",
        """The labels are added with the weight w, but the divergence keeps the weight 1. The gradient grows
        with w. Weight the divergence by 1 - w.""",
        {"mix": lambda soft, hard, w: soft + w * hard},
    ),
    (
        "sign_of_the_hard_labels",
        """The log-probability of the label is added with a plus, so that the right token becomes less
        likely. Its loss is -log q.""",
        {"mix": lambda soft, hard, w: (1 - w) * soft - w * hard},
    ),
    (
        "hard_labels_at_the_temperature",
        """The labels are learned at the temperature of the soft targets. The student is then certain only
        after division by T, and at 1 far too certain. Use the logits as they are.""",
        {"hard_temperature": lambda t: t},
    ),
    (
        "direction_not_passed_on",
        """The direction is not passed on, so the loss is always the forward divergence. Pass it to
        kl_divergence.""",
        {"direction_of": lambda direction: "forward"},
    ),
    (
        "temperature_not_passed_on",
        """The temperature is not passed on, so it is always 1. The targets stay sharp, and what the teacher
        knows about rare tokens is hardly seen.""",
        {"temperature_of": lambda t: 1.0},
    ),
    (
        "teacher_shifted_by_one",
        """The teacher's logits are one position off: those of the token before. The student learns to
        predict the token that it sees. Both models predict the same next token at each position.""",
        {"teacher": lambda logits: logits.roll(1, dims=1)},
    ),
    (
        "labels_shifted_by_one",
        """The labels are shifted once more, though they are the next tokens already. The hard part then
        contradicts the soft one. Gather the labels as they are.""",
        {"labels_of": lambda labels, mask: labels.masked_fill(mask == 0, 0).roll(-1, dims=1)},
    ),
    (
        "masked_label_is_an_index",
        """A label of -100 is used as an index, which fails or takes another token. Replace masked labels
        before gather.""",
        {"labels_of": lambda labels, mask: labels},
    ),
    (
        "hard_labels_detached",
        """The student's logits are detached in the part of the labels. The loss is right, but the labels
        have no gradient. Detach the teacher's alone.""",
        {"student_of": lambda logits: logits.detach()},
    ),
):
    register("distillation_loss", name, loss_with(**changes), explanation)


def hard_labels_with_the_factor(
    student_logits, teacher_logits, labels, mask, direction="forward", temperature=1.0, hard_weight=0.0
):
    """The factor T^2 multiplies the part of the labels too. At a temperature of 4 they count sixteen times,
    and the teacher hardly. It belongs to the divergence alone."""

    def mix(soft, hard, w):
        return (1 - w) * soft + w * temperature**2 * hard

    return loss_with(mix=mix)(
        student_logits, teacher_logits, labels, mask, direction, temperature, hard_weight
    )


step.mistake("distillation.distillation_loss", source="written for this catalogue")(
    hard_labels_with_the_factor
)
