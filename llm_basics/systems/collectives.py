"""Collective communication by send and receive: ring algorithms.

Every rank sends to its right neighbor and receives from its left one, a chunk at a time, so all links are
busy and no rank is a bottleneck. In an all-reduce of n numbers each rank sends `2 (world - 1) / world` times
n, for any number of ranks (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms").
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def chunk_sizes(n: int, world_size: int) -> list[int]:
    """Sizes of `world_size` chunks of n numbers, as even as possible, the larger ones first.

    >>> chunk_sizes(7, 3)
    [3, 2, 2]
    """
    return [n // world_size + (rank < n % world_size) for rank in range(world_size)]


def exchange(outgoing: Float[Tensor, " sent"], incoming: Float[Tensor, " received"]) -> None:
    """Send to the right neighbor while receiving from the left one.

    The send is asynchronous: if every rank sent first and waited, none would ever receive.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent = dist.isend(outgoing, (rank + 1) % world_size)
    dist.recv(incoming, (rank - 1) % world_size)
    assert sent is not None, "this rank is in the group"
    sent.wait()


def ring_reduce_scatter(tensor: Float[Tensor, " n"]) -> Float[Tensor, " chunk"]:
    """This rank's chunk of the sum of `tensor` over all ranks: chunk r of `chunk_sizes` for rank r.

    In step s, rank r sends its partial sum of chunk `r - s - 1` and adds its own numbers to the received
    partial sum of chunk `r - s - 2`. After `world - 1` steps, chunk r has passed through every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = tensor.split(chunk_sizes(len(tensor), world_size))
    partial = own[(rank - 1) % world_size].clone()
    for step in range(world_size - 1):
        chunk = own[(rank - step - 2) % world_size]
        received = torch.empty_like(chunk)
        exchange(partial, received)
        partial = received + chunk
    return partial


def ring_all_gather(chunk: Float[Tensor, " chunk"], n: int) -> Float[Tensor, " n"]:
    """The concatenation of all chunks on every rank; `n` is the total number of elements.

    In step s, rank r forwards chunk `r - s`, received in the previous step.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    full = chunk.new_empty(n)
    chunks = full.split(chunk_sizes(n, world_size))
    chunks[rank].copy_(chunk)
    for step in range(world_size - 1):
        exchange(chunks[(rank - step) % world_size], chunks[(rank - step - 1) % world_size])
    return full


def ring_all_reduce(tensor: Float[Tensor, "..."]) -> None:
    """Replace `tensor` on every rank by its sum over all ranks: a reduce-scatter, then an all-gather."""
    flat = tensor.flatten()
    tensor.copy_(ring_all_gather(ring_reduce_scatter(flat), len(flat)).view_as(tensor))
