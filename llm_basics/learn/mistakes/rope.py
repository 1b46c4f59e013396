"""RoPE: each pair of features (2i, 2i+1) is rotated by `position * theta^(-2i / d_head)`."""

import math

import torch

from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.learn import grids, probes

step = probes.Step("rope")
draw = probes.numbers(seed=5)


def by_hand(x, positions, theta):
    """Each pair as a complex number, rotated by its angle."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    speeds = theta ** -(torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angles = positions[..., None].double() * speeds
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


def angle_difference(x):
    """The rotation angle of the first wrong pair of `x`, and the expected one."""

    def words(expected, actual):
        if actual.shape != expected.shape:
            return f"the shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
        before, right, found = (t.double().unflatten(-1, (-1, 2)) for t in (x, expected, actual))
        off = (right - found).abs().amax(-1).nan_to_num(math.inf)
        *lead, position, pair = (off >= min(1e-3, off.max().item())).nonzero()[0].tolist()
        index = (*lead, position, pair)
        where = f"at position {position}, features {2 * pair} and {2 * pair + 1}"
        if not math.isclose(before[index].norm(), found[index].norm(), rel_tol=1e-2):
            return f"{where}: their norm changed, so they were not rotated as a pair"
        start, target, end = (
            math.atan2(pairs[index][1], pairs[index][0]) for pairs in (before, right, found)
        )
        return (
            f"{where} must be rotated by {math.remainder(target - start, math.tau):.3f} radians, "
            f"but are rotated by {math.remainder(end - start, math.tau):.3f}"
        )

    return words


def compare(about, x, positions, theta, context, **options):
    step.compare(
        about,
        lambda a, x, positions: a.run_rope(x.shape[-1], theta, context, x, positions),
        lambda x, positions: by_hand(x, positions, theta),
        {"x": x, "positions": positions},
        words=angle_difference(x),
        **options,
    )


# the tables of angles may be float32: an angle of 30 radians is then off by some 4e-6
ROPE = {"atol": 1e-4, "contract": "rope"}
compare("positions from 0", draw(2, 5, 6), torch.arange(5), 10000.0, 32, gradients=False, **ROPE)
compare("positions 7, 8, 9, ...", draw(2, 5, 6), torch.arange(7, 12), 10000.0, 32, **ROPE)
compare("positions with gaps", draw(2, 5, 6), torch.tensor([9, 2, 2, 30, 0]), 10000.0, 32, **ROPE)
compare("theta of 500", draw(2, 5, 6), torch.arange(3, 8), 500.0, 32, **ROPE)
compare(
    "a batch with positions for each sequence",
    draw(3, 5, 6),
    torch.tensor([[0, 1, 2, 3, 4], [3, 4, 9, 11, 30], [12, 13, 14, 15, 16]]),
    500.0,
    32,
    **ROPE,
)
compare("a single pair of features", draw(1, 4, 2), torch.arange(1, 5), 500.0, 32, **ROPE)
# bfloat16 counts to 256, float32 angles of 1,000 radians are off by up to 1e-4
compare(
    "positions beyond 256",
    draw(2, 5, 6),
    torch.arange(995, 1000),
    10000.0,
    1024,
    atol=3e-3,
    rtol=1e-3,
    contract="rope",
)
compare(
    "an axis for the heads",
    draw(2, 3, 5, 6),
    torch.arange(7, 12),
    10000.0,
    32,
    atol=1e-4,
    beyond="attention rotates (batch, heads, seq, d_head); the public test has no axis for the heads",
)
compare(
    "float16 numbers",
    draw(2, 5, 6).half(),
    torch.arange(5),
    10000.0,
    32,
    gradients=False,
    atol=1e-2,
    rtol=1e-2,
    beyond="the public test has float32 alone; in a model of half precision the result must be float16",
)
compare(
    "a batch of one sequence of one token",
    draw(1, 1, 6),
    torch.tensor([3]),
    10000.0,
    32,
    gradients=False,
    **ROPE,
)


# --------------------------------------------------------------------------------------------------
# Rotation


@step.mistake("functional.apply_rope", source="public solutions of CS336")
def halves_rotated_instead_of_pairs(x, cos, sin):
    """Feature i is paired with feature i + d/2, as in Hugging Face's Llama, whose weights are permuted for
    it. Here adjacent features (2i, 2i+1) form a pair: use x[..., 0::2] and x[..., 1::2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@step.mistake("functional.apply_rope", source="public solutions of CS336")
def result_concatenated(x, cos, sin):
    """The pairs are rotated correctly, but in the result all even features come before all odd ones.
    Interleave them again: torch.stack(..., dim=-1), then flatten the last two axes."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def halves_read_and_pairs_written(x, cos, sin):
    """The two features of a pair are read from the two halves of x, but written to adjacent features. Read
    them as they are written: x[..., 0::2] and x[..., 1::2]."""
    (first, second), cos, sin = x.chunk(2, dim=-1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


@step.mistake("functional.apply_rope", source="public solutions of CS336")
def rotated_the_other_way(x, cos, sin):
    """The sign of the angle is wrong. Queries and keys still match each other, but pretrained weights do not
    fit. It is (even cos - odd sin, even sin + odd cos)."""
    return rotated(x, cos, -sin)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def sine_and_cosine_exchanged(x, cos, sin):
    """Sine and cosine are swapped. A quick check: position 0 has angle 0 and must be unchanged. Check the
    order in which the two tables are returned and used."""
    return rotated(x, sin, cos)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def two_minus_signs(x, cos, sin):
    """Both lines of the rotation have a minus, which is not a rotation: dot products then depend on more than
    the distance. The second line is even sin + odd cos."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin - odd * cos], dim=-1).flatten(-2)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def two_plus_signs(x, cos, sin):
    """Both lines of the rotation have a plus, which is not a rotation: norms change. The first line is even
    cos - odd sin."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([even * cos + odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def angles_tiled(x, cos, sin):
    """The angles are laid out as (a, b, c, a, b, c), but pairs are adjacent features. Both features of a pair
    need the same angle: (a, a, b, b, c, c), by repeat_interleave."""
    cos, sin = (torch.cat([table, table], dim=-1).to(x.dtype) for table in (cos, sin))
    quarter_turn = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + quarter_turn * sin


@step.mistake("functional.apply_rope", source="written for this catalogue")
def odd_feature_from_the_rotated_even_one(x, cos, sin):
    """The even feature is overwritten before the odd one is computed from it. Both lines need the features
    from before the rotation."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    even = even * cos - odd * sin
    return torch.stack([even, even * sin + odd * cos], dim=-1).flatten(-2)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def input_changed_in_place(x, cos, sin):
    """The rotated features are written into the caller's tensor, so a second call rotates them twice. Fill a
    new one, torch.empty_like(x), or stack the two lines."""
    even, odd, cos, sin = x[..., 0::2].clone(), x[..., 1::2].clone(), cos.to(x.dtype), sin.to(x.dtype)
    x[..., 0::2] = even * cos - odd * sin
    x[..., 1::2] = even * sin + odd * cos
    return x


@step.mistake("functional.apply_rope", source="written for this catalogue")
def result_left_in_float32(x, cos, sin):
    """The tables are float32, so half-precision queries become float32, and attention with half-precision
    values fails. Convert to x.dtype."""
    return rotated(x.float(), cos, sin)


@step.mistake("functional.apply_rope", source="written for this catalogue")
def rotated_along_the_heads(x, cos, sin):
    """Positions are counted along the axis before the sequence, which is heads or batch. The sequence is the
    second to last axis: split into heads and transpose first."""
    return rotated(x, cos[..., : x.shape[-3], :].unsqueeze(-2), sin[..., : x.shape[-3], :].unsqueeze(-2))


@step.mistake("functional.apply_rope", source="written for this catalogue")
def axes_of_size_1_removed(x, cos, sin):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The result must have the shape of x."""
    return rotated(x, cos, sin).squeeze()


def rotated(x, cos, sin):
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


# --------------------------------------------------------------------------------------------------
# Angles


def tables(positions, speeds, device):
    angles = torch.outer(positions, speeds)
    return angles.cos().float().to(device), angles.sin().float().to(device)


@step.mistake("functional.rope_tables", source="public solutions of CS336; passes its suite")
def theta_fixed_at_10000(d_head, context_length, theta=10000.0, device=None):
    """theta is fixed at 10,000, whatever is passed. Llama 3 uses 500,000; use the argument, and check that
    each layer passes it on."""
    return tables(torch.arange(context_length), 10000.0 ** -(torch.arange(0, d_head, 2) / d_head), device)


@step.mistake("functional.rope_tables", source="public solutions of CS336")
def positions_from_1(d_head, context_length, theta=10000.0, device=None):
    """The first token has position 1. Its position must be 0, where the angle is 0 and nothing is rotated:
    count with torch.arange(n)."""
    positions = torch.arange(1, context_length + 1)
    return tables(positions, theta ** -(torch.arange(0, d_head, 2) / d_head), device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def exponent_half_as_large(d_head, context_length, theta=10000.0, device=None):
    """The exponent is i / d instead of 2i / d, so the last pairs rotate far too fast. Pair i has the features
    2i and 2i + 1: use torch.arange(0, d, 2) / d."""
    return tables(torch.arange(context_length), theta ** -(torch.arange(d_head // 2) / d_head), device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def exponent_twice_as_large(d_head, context_length, theta=10000.0, device=None):
    """The exponent is 2i / (d / 2), so the last pairs hardly rotate. Either count 0, 2, 4, ... and divide by
    d, or count 0, 1, 2, ... and divide by d / 2."""
    speeds = theta ** -(torch.arange(0, d_head, 2) / (d_head // 2))
    return tables(torch.arange(context_length), speeds, device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def exponents_from_1(d_head, context_length, theta=10000.0, device=None):
    """The pairs are counted from 1, so the exponents are 2/d, 4/d, ... 1 instead of 0, 2/d, ... and all pairs
    rotate too slowly. Pair 0 rotates by one radian per position: use torch.arange(0, d, 2) / d."""
    return tables(torch.arange(context_length), theta ** -(torch.arange(2, d_head + 2, 2) / d_head), device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def no_minus_in_the_exponent(d_head, context_length, theta=10000.0, device=None):
    """Frequencies grow with the pair instead of falling. The angle is the position times theta^(-2i / d), or
    divided by theta^(2i / d)."""
    speeds = theta ** (torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    return tables(torch.arange(context_length).double(), speeds, device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def all_pairs_equally_fast(d_head, context_length, theta=10000.0, device=None):
    """All pairs rotate by the same angle, as if every exponent were 0, perhaps because of an integer division
    (//) or an i that never changes. Pair i rotates by theta^(-2i / d) per position."""
    return tables(torch.arange(context_length), theta ** -(torch.arange(0.0, d_head, 2) // d_head), device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def speeds_reversed(d_head, context_length, theta=10000.0, device=None):
    """The last pair has the highest frequency and the first the lowest. Pair 0 rotates by one radian per
    position, since theta^0 is 1."""
    speeds = theta ** -(torch.arange(0, d_head, 2) / d_head)
    return tables(torch.arange(context_length), speeds.flip(0), device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def whole_turns_instead_of_radians(d_head, context_length, theta=10000.0, device=None):
    """The angles are multiplied by 2 pi, as for a frequency in revolutions. RoPE's angles are already in
    radians: position * theta^(-2i / d)."""
    speeds = math.tau * theta ** -(torch.arange(0, d_head, 2) / d_head)
    return tables(torch.arange(context_length), speeds, device)


@step.mistake("functional.rope_tables", source="written for this catalogue")
def positions_in_bfloat16(d_head, context_length, theta=10000.0, device=None):
    """The positions are bfloat16, which cannot represent 257: distant tokens share a position. Compute the
    angles in float32 or float64, in a half-precision model too."""
    positions = torch.arange(context_length).bfloat16().float()
    return tables(positions, theta ** -(torch.arange(0, d_head, 2) / d_head), device)


# --------------------------------------------------------------------------------------------------
# Positions


@step.mistake("layers.RotaryEmbedding", source="public solutions of CS336; passes its suite")
class PositionsIgnored(layers.RotaryEmbedding):
    """token_positions is ignored, and positions are always 0 to n - 1. Tokens that follow a cache are then
    rotated by wrong angles; select the rows of the tables by token_positions."""

    def forward(self, x, token_positions):
        return F.apply_rope(x, self.cos[: x.shape[-2]], self.sin[: x.shape[-2]])


@step.mistake("layers.RotaryEmbedding", source="written for this catalogue")
class PositionsCountedFromTheFirst(layers.RotaryEmbedding):
    """The rows of the tables are a range that starts at the first position. Positions may have gaps and any
    order; select a row for each: cos[token_positions]."""

    def forward(self, x, token_positions):
        positions = token_positions[..., :1] + torch.arange(x.shape[-2])
        return super().forward(x, positions.clamp(max=self.cos.shape[0] - 1))


@step.mistake("layers.RotaryEmbedding", source="written for this catalogue")
class PositionsOfTheFirstText(layers.RotaryEmbedding):
    """All sequences of a batch use the positions of the first one. Positions can have a batch axis, as for
    packed or padded sequences; index the tables with all of them."""

    def forward(self, x, token_positions):
        return super().forward(x, token_positions.reshape(-1, x.shape[-2])[0])


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.rope_tables", grids.powers(10, 1e7, per_decade=6))
def theta_fixed_at_a_number(value):
    """theta is fixed at {value}, whatever is passed. Llama 3 uses 500,000; use the argument, and check that
    each layer passes it on."""

    def wrong(d_head, context_length, theta=10000.0, device=None):
        return tables(torch.arange(context_length), value ** -(torch.arange(0, d_head, 2) / d_head), device)

    return wrong


@step.family("functional.rope_tables", [i for i in range(-16, 65) if i])
def positions_offset_by_a_number(value):
    """Every position is off by {value}: the first token must have position 0, where the angle is 0 and
    nothing is rotated. Count with torch.arange(n)."""

    def wrong(d_head, context_length, theta=10000.0, device=None):
        positions = torch.arange(context_length) + value
        return tables(positions, theta ** -(torch.arange(0, d_head, 2) / d_head), device)

    return wrong


def rounded_tables(rounded, dtype):
    """Tables that are right but for the numbers whose names are in `rounded`."""

    def wrong(d_head, context_length, theta=10000.0, device=None):
        def cast(name, values):
            return values.to(dtype).double() if name in rounded else values.double()

        speeds = cast("frequencies", theta ** -(torch.arange(0, d_head, 2).double() / d_head))
        angles = cast("angles", torch.outer(cast("positions", torch.arange(context_length)), speeds))
        return tuple(cast("tables", table).float().to(device) for table in (angles.cos(), angles.sin()))

    return wrong


@step.family("functional.rope_tables", grids.DTYPES, unknown="a dtype of fewer bits")
def tables_in_another_dtype(value):
    """The tables of cos and sin are rounded to {value}, which keeps three digits or fewer, so norms and
    distances change. Keep them in float32, and convert the rotated features to x.dtype."""
    return rounded_tables(["tables"], value)


@step.family("functional.rope_tables", grids.DTYPES, unknown="a dtype of fewer bits")
def angles_in_another_dtype(value):
    """The angles are rounded to {value}, so large angles are off by a part of a turn. Compute angles in
    float32 or float64, in a half-precision model too."""
    return rounded_tables(["angles"], value)


@step.family("functional.rope_tables", grids.DTYPES, unknown="a dtype of fewer bits")
def frequencies_in_another_dtype(value):
    """The frequencies theta^(-2i / d) are rounded to {value}, an error that grows with the position. Compute
    frequencies and angles in float32 or float64, in a half-precision model too."""
    return rounded_tables(["frequencies"], value)


@step.family("functional.rope_tables", grids.DTYPES, unknown="a dtype of fewer bits")
def all_of_rope_in_another_dtype(value):
    """Positions, frequencies, angles and tables are all computed in {value}: distant tokens share an angle.
    Compute them in float32 or float64, and convert the rotated features to x.dtype."""
    return rounded_tables(["positions", "frequencies", "angles", "tables"], value)


step.factor("functional.apply_rope")
