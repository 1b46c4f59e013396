"""Quantization of weights and key-value caches to 8 or 4 bits: group-wise, symmetric, round to nearest.

A group of neighboring weights of a row shares a scale, so that the largest is 127 (int8) or 7 (int4):

    scale = max |w| / most,   number = round(w / scale),   |w - scale * number| <= scale / 2

Products are computed in floating point with dequantized weights, which saves memory, but not arithmetic. Not
for training. Sources: round to nearest as the baseline of GPTQ (arXiv 2210.17323); a scale for each row and
each token (LLM.int8(), arXiv 2208.07339).
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from llm_basics.core import functional as F
from llm_basics.core import layers

# largest number of each width; symmetric, so that -128 and -8 are not used
MOST = {8: 127, 4: 7}

# minimum |w| of a group for a representable scale; below, all numbers are 0
TINY = 2.0**-100

# --------------------------------------------------------------------------------------------------
# Numbers and scales


def quantize(
    weight: Float[Tensor, "rows columns"], bits: int, group_size: int | None = None
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows groups"]]:
    """Numbers, and a scale for each `group_size` columns of a row; None: one for the whole row.

    The last group of a row is shorter if the columns do not divide into groups.

    >>> numbers, scales = quantize(torch.tensor([[0.7, -0.32, 14.0]]), bits=4, group_size=2)
    >>> numbers.tolist(), [[round(scale, 4) for scale in row] for row in scales.tolist()]
    ([[7, -3, 7]], [[0.1, 2.0]])
    """
    if bits not in MOST:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for whole rows, got {group_size}")
    if not weight.isfinite().all():
        raise ValueError("weights must be finite to be quantized, got NaN or infinity; check the checkpoint")
    groups = _grouped(weight.float(), group_size)
    scales = groups.abs().amax(-1).clamp(min=TINY) / MOST[bits]
    # a scale is rounded too, so the largest quotient may pass `most` by an ulp
    numbers = (groups / scales[..., None]).round().clamp(-MOST[bits], MOST[bits])
    return rearrange(numbers, "rows groups size -> rows (groups size)")[:, : weight.shape[1]].char(), scales


def dequantize(
    numbers: Int8[Tensor, "rows columns"],
    scales: Float[Tensor, "rows groups"],
    group_size: int | None = None,
) -> Float[Tensor, "rows columns"]:
    """`scale * number`, at most `scale / 2` from the weight that was quantized.

    >>> weight = torch.tensor([[0.7, -0.32, 14.0]])
    >>> numbers, scales = quantize(weight, bits=4, group_size=2)
    >>> restored = dequantize(numbers, scales, group_size=2)
    >>> (weight - restored).abs()[0, 1] <= scales[0, 0] / 2
    tensor(True)
    """
    columns = numbers.shape[1]
    if scales.shape[1] != _n_groups(columns, group_size):
        raise ValueError(
            f"{columns} columns in groups of {group_size} must have {_n_groups(columns, group_size)} scales "
            f"a row, got {scales.shape[1]}; pass the group_size of quantize"
        )
    if scales.shape[1] == 1:
        return numbers * scales
    restored = _grouped(numbers, group_size) * scales[..., None]
    return rearrange(restored, "rows groups size -> rows (groups size)")[:, :columns]


def _n_groups(columns: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-columns // group_size)


def _grouped(matrix: Tensor, group_size: int | None) -> Tensor:
    """The groups of each row, the last one padded with zeros, which change no maximum."""
    rows, columns = matrix.shape
    n_groups = _n_groups(columns, group_size)
    missing = n_groups * (group_size or columns) - columns
    if missing:
        matrix = torch.cat([matrix, matrix.new_zeros(rows, missing)], dim=1)
    return rearrange(matrix, "rows (groups size) -> rows groups size", groups=n_groups)


def pack_int4(numbers: Int8[Tensor, "rows columns"]) -> UInt8[Tensor, "rows half"]:
    """Two numbers from -8 to 7 in a byte, the first in its low half; an odd last one is followed by 0.

    >>> pack_int4(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    tensor([[241,   7]], dtype=torch.uint8)
    """
    if numbers.numel() and not -8 <= int(numbers.min()) <= int(numbers.max()) <= 7:
        raise ValueError(
            f"int4 numbers must be from -8 to 7, got {int(numbers.min())} to {int(numbers.max())}"
        )
    if numbers.shape[1] % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(len(numbers), 1)], dim=1)
    halves = (numbers & 15).to(torch.uint8)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpack_int4(packed: UInt8[Tensor, "rows half"], columns: int) -> Int8[Tensor, "rows columns"]:
    """The numbers of `pack_int4`.

    >>> unpack_int4(torch.tensor([[241, 7]], dtype=torch.uint8), columns=3)
    tensor([[ 1, -1,  7]], dtype=torch.int8)
    """
    if packed.shape[1] != -(-columns // 2):
        raise ValueError(f"{columns} int4 numbers must have {-(-columns // 2)} bytes, got {packed.shape[1]}")
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).char()
    # two's complement of four bits: 8 to 15 are -8 to -1
    signed = (halves ^ 8) - 8
    return rearrange(signed, "rows half two -> rows (half two)")[:, :columns]


# --------------------------------------------------------------------------------------------------
# Layers


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with the quantized weights of a linear layer; `b` is unchanged.

    `weight` is dequantized at each use, for layers that read it, such as SwiGLU.
    """

    numbers: Tensor
    scales: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None = None,
        bits: int = 8,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        numbers, scales = quantize(weight.detach(), bits, group_size)
        self.bits, self.group_size = bits, group_size
        self.out_features, self.in_features = weight.shape
        self.register_buffer("numbers", pack_int4(numbers) if bits == 4 else numbers.contiguous())
        self.register_buffer("scales", scales.to(weight.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The dequantized weights."""
        numbers = unpack_int4(self.numbers, self.in_features) if self.bits == 4 else self.numbers
        return dequantize(numbers, self.scales, self.group_size)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        groups = "rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.in_features} -> {self.out_features}, int{self.bits}, {groups}"


class QuantizedKVCache(layers.KVCache):
    """`layers.KVCache` in int8, with a scale for each token and head: `|k - restored| <= max |k| / 254`.

    A token takes `d_head + 4` bytes of keys and of values in each head, instead of `4 d_head`.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        context_length: int,
        d_head: int,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, n_kv_heads, context_length, d_head)
        self._numbers = [torch.zeros(shape, dtype=torch.int8, device=device) for _ in range(2)]
        self._scales = [torch.zeros(shape[:-1], device=device) for _ in range(2)]
        self.length = 0

    def append(
        self, key: Float[Tensor, "batch heads new d_head"], value: Float[Tensor, "batch heads new d_head"]
    ) -> tuple[Float[Tensor, "batch heads keys d_head"], Float[Tensor, "batch heads keys d_head"]]:
        """Quantize keys and values of new tokens; returns the dequantized ones of all tokens."""
        end, capacity = self.length + key.shape[-2], self._numbers[0].shape[-2]
        if end > capacity:
            raise ValueError(f"the KV cache holds {capacity} tokens, got token {end}")
        for x, numbers, scales in zip((key, value), self._numbers, self._scales, strict=True):
            rows = rearrange(x, "batch heads new d_head -> (batch heads new) d_head")
            new_numbers, new_scales = quantize(rows, bits=8)
            numbers[:, :, self.length : end] = new_numbers.view(x.shape)
            scales[:, :, self.length : end] = new_scales.view(x.shape[:-1])
        self.length = end
        keys, values = (
            (numbers[:, :, :end] * scales[:, :, :end, None]).to(key.dtype)
            for numbers, scales in zip(self._numbers, self._scales, strict=True)
        )
        return keys, values

    def select(self, texts: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self._numbers = [each[texts] for each in self._numbers]
        self._scales = [each[texts] for each in self._scales]

    @property
    def keys(self) -> Tensor:
        """Raises ValueError, since code that reads or replaces the tensors of a cache cannot use this one."""
        raise ValueError(
            "an int8 KV cache is filled by `append`, but the attention in use reads or replaces its keys (a "
            "MultiHeadSelfAttention of user code without a parameter `cache`); use --kv_cache float32"
        )

    @keys.setter
    def keys(self, value: Tensor) -> None:
        self.keys  # noqa: B018, raises

    @property
    def n_bytes(self) -> int:
        """Bytes of all numbers and scales."""
        return sum(each.numel() * each.element_size() for each in [*self._numbers, *self._scales])
