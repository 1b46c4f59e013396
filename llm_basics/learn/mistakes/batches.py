"""Batches: windows from random positions of a text, and as targets the same windows shifted by one token."""

import numpy as np
import torch

from llm_basics import swap
from llm_basics.learn import probes

step = probes.Step("batches")
get_batch = swap.reference("dataloader.get_batch")

# --------------------------------------------------------------------------------------------------
# Probes: only what does not depend on the draw, and of so many draws that each place is among them

# 13 tokens have 9 places for a window of 4 and its last target
TOKENS, CONTEXT, PLACES = np.arange(100, 113), 4, 9


def calls(a, tokens=TOKENS, n=250, device="cpu"):
    return [a.run_get_batch(tokens, 8, CONTEXT, device) for _ in range(n)]


def draws(a):
    """Inputs and targets of 250 calls, which must not all be the same ones."""
    batches = calls(a)
    inputs, targets = (torch.stack(rows).long() for rows in zip(*batches, strict=True))
    if inputs.shape != (250, 8, CONTEXT) or (inputs == inputs[0]).all():
        raise ValueError("there must be 250 different batches")
    return inputs, targets


def places_of(a):
    return draws(a)[0][..., 0] - TOKENS[0]


def by_column(differences):
    """The distinct numbers at each position of a window."""
    return [column.unique().tolist() for column in differences.unbind(-1)]


def shapes(a):
    inputs, targets = calls(a)[0]
    return {"inputs": list(inputs.shape), "targets": list(targets.shape)}


step.value(
    "the shapes of a batch of 8 sequences of 4 tokens",
    shapes,
    {"inputs": [8, 4], "targets": [8, 4]},
    contract="batches",
)


def one_call_and_the_next(a):
    batches = {tuple(inputs[:, 0].tolist()) for inputs, _ in calls(a)}
    if len(batches) > 1:
        return "others"
    return "the first ones" if batches == {tuple(TOKENS[:8].tolist())} else "the same ones"


step.value(
    "different sequences in each call",
    one_call_and_the_next,
    "others",
    contract="batches",
    words=lambda right, found: f"each call must draw new windows, but gives {found}",
)


def input_shift(a):
    inputs, _ = draws(a)
    return by_column(inputs - inputs[..., :1])


step.value(
    "inputs are consecutive tokens",
    input_shift,
    [[0], [1], [2], [3]],
    contract="batches",
    words=lambda right, found: "the tokens of a window are not consecutive in the text",
)


def target_shift(a):
    inputs, targets = draws(a)
    return by_column(targets - inputs)


def describe_shift(right, found):
    if all(column == found[0] and len(column) == 1 for column in found):
        shift = found[0][0]
        wrong = f"the token at offset {shift:+d}" if shift else "the token itself"
        return f"the target of each token must be the next one in the text, but it is {wrong}"
    place = next(i for i in range(len(right)) if right[i] != found[i])
    return f"the target of token {place} of a window is not the next token in the text"


step.value(
    "targets are the inputs shifted by one token",
    target_shift,
    [[1]] * 4,
    words=describe_shift,
    contract="batches",
)


def describe_places(right, found):
    missing, extra = sorted(set(right) - set(found)), sorted(set(found) - set(right))
    texts = [f"never start at {missing}"] * bool(missing) + [f"also start at {extra}"] * bool(extra)
    return f"windows of 4 of 13 tokens must start at positions 0 to 8, but {' and '.join(texts)}"


step.value(
    "sequences start at every valid position, including the first and the last",
    lambda a: places_of(a).unique().tolist(),
    list(range(PLACES)),
    words=describe_places,
    contract="batches",
)


def out_of_proportion(a):
    starts = places_of(a).flatten().tolist()
    # 222 of each are expected; half as many more are eight standard deviations
    return [s for s in sorted(set(starts)) if not 0.5 < starts.count(s) * PLACES / len(starts) < 1.5]


step.value(
    "start positions are uniform",
    out_of_proportion,
    [],
    contract="batches",
    words=lambda right, found: f"start positions {found} are drawn far more or far less often than others",
)
# how far the places of neighbors in a batch are apart; 0 is left out, for draws without repetition
step.value(
    "each sequence of a batch has its own start",
    lambda a: sorted(set(places_of(a).diff(dim=1).abs().unique().tolist()) - {0}),
    list(range(1, PLACES)),
    contract="batches",
    words=lambda right, found: (
        f"the windows of a batch are always {found} tokens apart, not drawn independently"
        if found
        else "all windows of a batch start at the same position"
    ),
)


def types(a):
    inputs, targets = calls(a, np.full(13, 60_000, dtype=np.uint16), 60)[0]
    return [str(inputs.dtype), str(targets.dtype), inputs[0, 0].item(), targets[0, 0].item()]


step.value(
    "uint16 tokens of 60,000 become int64 with the same values",
    types,
    ["torch.int64", "torch.int64", 60_000, 60_000],
    contract="batches",
    words=lambda right, found: (
        f"inputs and targets must be torch.int64 with token 60000, got {found[0]} and {found[1]} "
        f"with {found[2]} and {found[3]}"
    ),
)
step.value(
    "a text with room for a single sequence",
    lambda a: [[rows.tolist() for rows in a.run_get_batch(np.arange(5), 1, 4, "cpu")] for _ in range(60)][0],
    [[[0, 1, 2, 3]], [[1, 2, 3, 4]]],
    contract="batches",
)


def more_than_places(a):
    try:
        n_windows, length = a.run_get_batch(TOKENS, 300, CONTEXT, "cpu")[0].shape
    except (ValueError, IndexError, RuntimeError):
        n_windows, length = 0, CONTEXT
    if length != CONTEXT:
        return "windows of another length"
    return "300 windows" if n_windows == 300 else "fewer, or an error"


step.value(
    "300 sequences from a text with 9 start positions",
    more_than_places,
    "300 windows",
    beyond="sequences drawn without repetition are uniform too, but a short text then has too few",
    words=lambda right, found: f"a batch of 300 windows from a text with 9 start positions gives {found}",
)
step.value(
    "a batch for another device",
    lambda a: [rows.device.type for rows in calls(a, n=60, device="meta")[0]],
    ["meta", "meta"],
    beyond="a device other than the CPU that every machine has; the public test has one that none has",
    words=lambda right, found: f"the batch must be on device {right[0]}, but is on {' and '.join(found)}",
)


def nowhere(a):
    try:
        calls(a, n=1, device="cuda:99")
    except NotImplementedError:
        raise
    except Exception:
        return "refused"
    return "ignored"


step.value(
    "a device that does not exist",
    nowhere,
    "refused",
    words=lambda right, found: "a batch for cuda:99 must fail where there is none, but the device is ignored",
    contract="device",
)


class Vast(np.ndarray):
    """Tokens that no memory can hold: one number that claims to be 2^48. Only parts can be worked on."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(x) if isinstance(x, Vast) else x for x in inputs]
        if max(np.size(x) for x in plain) > 2**40:
            raise MemoryError("all of the text is read")
        return getattr(ufunc, method)(*plain, **options)

    def __iter__(self):
        if self.size > 2**40:
            raise MemoryError("all of the text is read")
        return super().__iter__()


def far_too_large(a):
    one = np.full(1, 7, dtype=np.uint16)
    vast = np.lib.stride_tricks.as_strided(one, shape=(2**48,), strides=(0,)).view(Vast)
    try:
        inputs, _ = a.run_get_batch(vast, 8, 16, "cpu")
    except (MemoryError, RuntimeError):
        return "read as a whole"
    return "read in windows" if list(inputs.shape) == [8, 16] else "read otherwise"


step.value(
    "a text far larger than memory",
    far_too_large,
    "read in windows",
    beyond="a training set of many gigabytes is a memory map; the public test has 100 tokens",
    words=lambda right, found: "the whole text is read into memory, not only the windows",
)


def too_short(a):
    try:
        a.run_get_batch(np.arange(4), 2, 4, "cpu")
    except NotImplementedError:
        raise
    except Exception:
        return "refused"
    return "accepted"


step.value(
    "a text one token too short for a sequence and its last target",
    too_short,
    "refused",
    beyond="no sequence fits, which an error shows at once",
    words=lambda right, found: "4 tokens have no room for a window of 4 and its last target: raise an error",
)


def seeded(a):
    one, again, other = (a.run_seeded_batch(TOKENS, 8, CONTEXT, seed)[0].tolist() for seed in (1, 1, 2))
    return {"same": one == again, "other": one != other}


step.value(
    "the generator that is passed determines the batch",
    seeded,
    {"same": True, "other": True},
    words=lambda right, found: (
        "another generator must give another batch"
        if found["same"]
        else "two generators of the same seed must give the same batch"
    ),
)

# --------------------------------------------------------------------------------------------------
# Mistakes: which window, which target


def windows(tokens, starts, length, device="cpu"):
    return torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]).astype(np.int64)).to(device)


def pairs(tokens, starts, context_length, device):
    rows = windows(tokens, starts, context_length + 1, device)
    return rows[:, :-1], rows[:, 1:]


def draw_from(rng, low, high, n):
    return np.random.randint(low, high, n) if rng is None else rng.integers(low, high, n)


def places(tokens, batch_size, context_length, rng):
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens hold no window of {context_length} and its last target")
    return draw_from(rng, 0, len(tokens) - context_length, batch_size)


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def target_equals_input(tokens, batch_size, context_length, device="cpu", rng=None):
    """The target of each token is the token itself. The loss falls to nearly 0, and the model learns only to
    copy. Targets must start one token after the inputs."""
    inputs, _ = get_batch(tokens, batch_size, context_length, device, rng)
    return inputs, inputs


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def targets_shifted_by_two(tokens, batch_size, context_length, device="cpu", rng=None):
    """The targets start two tokens after the inputs, so the model learns to skip a token. The loss stays
    high, and samples are broken. Shift by one."""
    starts = draw_from(rng, 0, len(tokens) - context_length - 1, batch_size)
    rows = windows(tokens, starts, context_length + 2, device)
    return rows[:, :-2], rows[:, 2:]


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def target_is_the_previous_token(tokens, batch_size, context_length, device="cpu", rng=None):
    """The target of each token is the previous one: inputs and targets are swapped, or shifted the wrong way.
    The model has already seen the answer and learns to repeat it. Targets start one token later."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return targets, inputs


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def last_target_from_the_beginning(tokens, batch_size, context_length, device="cpu", rng=None):
    """The targets are the inputs rolled by one, so the last target is the first token of the window. One
    target per window is nonsense. Slice context_length + 1 tokens, and drop the first."""
    rows = windows(tokens, places(tokens, batch_size, context_length, rng), context_length)
    return rows.to(device), torch.cat([rows[:, 1:], rows[:, :1]], dim=1).to(device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def last_target_repeated(tokens, batch_size, context_length, device="cpu", rng=None):
    """The last target repeats the last input, since the window was sliced without the token after it. Slice
    context_length + 1 tokens: inputs are all but the last, targets all but the first."""
    rows = windows(tokens, places(tokens, batch_size, context_length, rng), context_length)
    return rows.to(device), torch.cat([rows[:, 1:], rows[:, -1:]], dim=1).to(device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def targets_drawn_apart(tokens, batch_size, context_length, device="cpu", rng=None):
    """Inputs and targets are sliced at independently drawn positions, so they are unrelated. Draw the start
    positions once, and use them for both."""
    first = pairs(tokens, places(tokens, batch_size, context_length, rng), context_length, device)
    second = pairs(tokens, places(tokens, batch_size, context_length, rng), context_length, device)
    return first[0], second[1]


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def windows_one_token_short(tokens, batch_size, context_length, device="cpu", rng=None):
    """Windows of context_length tokens are sliced and then split, so inputs and targets are one token short.
    Slice context_length + 1."""
    starts = places(tokens, batch_size, context_length, rng)
    return pairs(tokens, starts, context_length - 1, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def batch_and_sequence_exchanged(tokens, batch_size, context_length, device="cpu", rng=None):
    """Windows are stacked as columns, so the batch has shape (context_length, batch_size), and the model
    attends across sequences. Stack them as rows."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return inputs.T, targets.T


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def tokens_drawn_one_by_one(tokens, batch_size, context_length, device="cpu", rng=None):
    """A random position is drawn for every token instead of every window, so inputs are not contiguous text.
    Draw one start per window, and take the tokens that follow it."""
    starts = places(tokens, batch_size * context_length, context_length, rng)
    rows = windows(tokens, starts, 2, device).reshape(batch_size, context_length, 2)
    return rows[..., 0], rows[..., 1]


# --------------------------------------------------------------------------------------------------
# Mistakes: where windows start


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def last_place_never_drawn(tokens, batch_size, context_length, device="cpu", rng=None):
    """The upper bound of the draw is one too low, so the last token is never a target. As an exclusive bound,
    as in randint(0, end), it is len(tokens) - context_length."""
    places(tokens, batch_size, context_length, rng)
    starts = draw_from(rng, 0, len(tokens) - context_length - 1, batch_size)
    return pairs(tokens, starts, context_length, device)


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def one_place_too_many(tokens, batch_size, context_length, device="cpu", rng=None):
    """The upper bound of the draw is one too high: there the last target lies beyond the end of the text,
    which fails now and then. As an exclusive bound it is len(tokens) - context_length."""
    starts = draw_from(rng, 0, len(tokens) - context_length + 1, batch_size)
    return pairs(tokens, starts, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def first_place_never_drawn(tokens, batch_size, context_length, device="cpu", rng=None):
    """The lower bound of the draw is 1, so no window starts at the first token. Positions count from 0."""
    places(tokens, batch_size, context_length, rng)
    starts = draw_from(rng, 1, len(tokens) - context_length, batch_size)
    return pairs(tokens, starts, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def late_places_pushed_back(tokens, batch_size, context_length, device="cpu", rng=None):
    """Starts are drawn from the whole text, and those too close to the end are clamped to the last valid one,
    so the end of the text is drawn far too often. Draw from valid starts only."""
    places(tokens, batch_size, context_length, rng)
    starts = draw_from(rng, 0, len(tokens), batch_size).clip(max=len(tokens) - context_length - 1)
    return pairs(tokens, starts, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def windows_side_by_side_only(tokens, batch_size, context_length, device="cpu", rng=None):
    """Windows start at multiples of context_length only, so most start positions never occur, and the model
    always sees the text split at the same points. Draw any valid start."""
    starts = places(tokens, batch_size, context_length, rng) // context_length * context_length
    return pairs(tokens, starts, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def always_from_the_beginning(tokens, batch_size, context_length, device="cpu", rng=None):
    """Every call returns the first windows of the text; nothing is random, and the rest of the text is never
    seen. Draw a random start for each window."""
    fit = max(1, len(tokens) - context_length)
    return pairs(tokens, np.arange(batch_size) % fit, context_length, device)


@step.mistake("dataloader.get_batch", source="public solutions of CS336")
def one_place_for_the_whole_batch(tokens, batch_size, context_length, device="cpu", rng=None):
    """One start is drawn and used for all windows of the batch, which are then identical. Such a batch is
    worth no more than one window; draw batch_size starts."""
    start = places(tokens, 1, context_length, rng)[0]
    return pairs(tokens, [start] * batch_size, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def windows_follow_one_another(tokens, batch_size, context_length, device="cpu", rng=None):
    """One start is drawn, and the windows of the batch begin there and at the tokens right after it, so they
    are nearly the same text. Draw a start for each window."""
    starts = places(tokens, 1, context_length, rng) + np.arange(batch_size)
    return pairs(tokens, starts % (len(tokens) - context_length), context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def same_seed_in_every_call(tokens, batch_size, context_length, device="cpu", rng=None):
    """The random generator is recreated from a fixed seed in every call, which returns the same batch
    forever. Seed once, before training, and keep using the same generator."""
    return get_batch(tokens, batch_size, context_length, device, np.random.default_rng(0))


@step.mistake("dataloader.get_batch", source="public solutions of CS336; passes its suite")
def generator_ignored(tokens, batch_size, context_length, device="cpu", rng=None):
    """The generator that is passed is ignored, and the starts come from a global or a new one, so a seed does
    not reproduce the batches. Draw with rng.integers, and make a generator only if rng is None."""
    return get_batch(tokens, batch_size, context_length, device)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def no_place_drawn_twice(tokens, batch_size, context_length, device="cpu", rng=None):
    """Starts are drawn without replacement, as by random.sample or randperm. A batch with more windows than
    there are starts fails or comes out short. randint draws with replacement."""
    if batch_size > max(1, len(tokens) - context_length):
        raise ValueError("cannot take a larger sample than population")
    return get_batch(tokens, batch_size, context_length, device, rng)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def all_places_shuffled_for_one_batch(tokens, batch_size, context_length, device="cpu", rng=None):
    """All start positions are listed and shuffled, as by randperm, and a few are taken. For gigabytes of text
    that fills the memory in every call, and no start can occur twice. Use randint."""
    starts = (rng or np.random).permutation(len(tokens) - context_length)[:batch_size]
    return pairs(tokens, starts, context_length, device)


# --------------------------------------------------------------------------------------------------
# Mistakes: types, devices and memory


@step.mistake("dataloader.get_batch", source="public solutions of CS336; passes its suite")
def int32_instead_of_int64(tokens, batch_size, context_length, device="cpu", rng=None):
    """The ids are int32. Cross-entropy and gather need int64 targets; convert with .long() or
    .astype(np.int64)."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return inputs.int(), targets.int()


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def type_of_the_file_kept(tokens, batch_size, context_length, device="cpu", rng=None):
    """The ids keep the dtype of the file, such as uint16, which embedding and loss do not accept. Convert the
    windows with .astype(np.int64)."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return tuple(x.to(getattr(torch, str(tokens.dtype))) for x in (inputs, targets))


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def ids_as_floating_point_numbers(tokens, batch_size, context_length, device="cpu", rng=None):
    """The ids are float32, which is what torch.Tensor(...) and torch.zeros create. They are indices into the
    embedding: convert them to int64."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return inputs.float(), targets.float()


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def ids_through_int16(tokens, batch_size, context_length, device="cpu", rng=None):
    """uint16 tokens are converted to int16 first, so ids from 32,768 on become negative, and the embedding
    fails. Convert directly to int64."""
    inputs, targets = get_batch(tokens, batch_size, context_length, device, rng)
    return tuple(rows.short().long() for rows in (inputs, targets))


@step.mistake("dataloader.get_batch", source="public solutions of CS336; passes its suite")
def whole_text_read_into_memory(tokens, batch_size, context_length, device="cpu", rng=None):
    """The whole text is converted or copied in every call before windows are sliced. For a memory-mapped file
    of gigabytes this is slow or runs out of memory. Slice first, and convert only the windows."""
    return get_batch(tokens.astype(np.int64), batch_size, context_length, device, rng)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def device_ignored(tokens, batch_size, context_length, device="cpu", rng=None):
    """The batch stays on the CPU whatever device is passed, so a model on a GPU cannot use it. End with
    .to(device)."""
    return get_batch(tokens, batch_size, context_length, "cpu", rng)


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def targets_left_on_the_CPU(tokens, batch_size, context_length, device="cpu", rng=None):
    """The inputs are moved to the device, but the targets are not, so the loss fails on a GPU. Move both."""
    inputs, targets = get_batch(tokens, batch_size, context_length, "cpu", rng)
    return inputs.to(device), targets


@step.mistake("dataloader.get_batch", source="written for this catalogue")
def short_text_repeated(tokens, batch_size, context_length, device="cpu", rng=None):
    """A text too short for one window is silently padded or repeated. The model then learns transitions that
    no text has, and the missing data goes unnoticed. Raise an error."""
    if len(tokens) <= context_length:
        tokens = np.resize(tokens, context_length + 1)
    return get_batch(tokens, batch_size, context_length, device, rng)
