"""Ring collectives: reduce-scatter, all-gather and all-reduce from send and receive, on three ranks."""

import contextlib

import torch
import torch.distributed as dist

from llm_basics import swap
from llm_basics.learn import probes, ranks
from llm_basics.systems import collectives

step = probes.Step("ring_all_reduce")
WORLD = 3
right_scatter = swap.reference("collectives.ring_reduce_scatter")
right_gather = swap.reference("collectives.ring_all_gather")


def numbers_of(rank, *shape):
    """The numbers that a rank begins with."""
    return probes.numbers(seed=20 + rank)(*shape)


def total(*shape):
    return sum(numbers_of(rank, *shape) for rank in range(WORLD))


def chunk_of(tensor, rank, world_size=WORLD):
    return tensor.tensor_split(world_size)[rank]


# methods of a process group by the name of the collective that calls them, in any version of torch
COUNTED = {
    "send": "send",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "broadcast": "broadcast",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
}
# the first argument is the output, the second the input
WITH_OUTPUT = {"_allgather_base", "all_gather_single", "_reduce_scatter_base", "reduce_scatter_single"}


@contextlib.contextmanager
def traffic():
    """Record the collectives of this rank in the block: name, size and dtype of what it gives."""
    group, seen = dist.ProcessGroup, []
    originals = {name: vars(group)[name] for name in COUNTED if name in vars(group)}

    def counted(name):
        def call(self, *args, **kwargs):
            given = args[name in WITH_OUTPUT]
            tensors = given if isinstance(given, list) else [given]
            while tensors and isinstance(tensors[0], list):
                tensors = tensors[0]
            size = sum(tensor.numel() for tensor in tensors)
            seen.append((COUNTED[name], size, str(tensors[0].dtype).removeprefix("torch.")))
            return originals[name](self, *args, **kwargs)

        return call

    for name in originals:
        setattr(group, name, counted(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def sent(seen):
    """Numbers that a rank sends point to point, and the ready-made collectives that it uses."""
    ready_made = sorted({name for name, _, _ in seen} - {"send"})
    return {"numbers sent": sum(n for name, n, _ in seen if name == "send"), "ready-made": ready_made}


# --------------------------------------------------------------------------------------------------
# Probes


def reduce_scatter(n):
    def on_rank(a):
        tensor = numbers_of(dist.get_rank(), n)
        with traffic() as seen:
            chunk = a.run_ring_reduce_scatter(tensor)
        changed = not torch.equal(tensor, numbers_of(dist.get_rank(), n))
        return {"chunk": chunk.clone(), "changes its input": changed, **sent(seen)}

    def expected(rank):
        n_sent = sum(len(chunk_of(torch.zeros(n), (rank - k - 1) % WORLD)) for k in range(WORLD - 1))
        chunk = chunk_of(total(n), rank)
        return {"chunk": chunk, "changes its input": False, "numbers sent": n_sent, "ready-made": []}

    return on_rank, expected


def all_gather(n):
    def on_rank(a):
        chunk = chunk_of(numbers_of(0, n), dist.get_rank()).clone()
        with traffic() as seen:
            whole = a.run_ring_all_gather(chunk, n)
        return {"whole": whole.clone(), **sent(seen)}

    def expected(rank):
        n_sent = sum(len(chunk_of(torch.zeros(n), (rank - k) % WORLD)) for k in range(WORLD - 1))
        return {"whole": numbers_of(0, n), "numbers sent": n_sent, "ready-made": []}

    return on_rank, expected


def all_reduce(*shape, is_transposed=False):
    def on_rank(a):
        tensor = numbers_of(dist.get_rank(), *shape)
        tensor = tensor.T if is_transposed else tensor
        with traffic() as seen:
            a.run_ring_all_reduce(tensor)
        return {"tensor": tensor, **sent(seen)}

    def expected(rank):
        whole = total(*shape)
        n = whole.numel()
        sizes = [len(chunk_of(torch.zeros(n), k)) for k in range(WORLD)]
        n_sent = sum(sizes[(rank - k - 1) % WORLD] + sizes[(rank - k) % WORLD] for k in range(WORLD - 1))
        tensor = whole.T if is_transposed else whole
        return {"tensor": tensor, "numbers sent": n_sent, "ready-made": []}

    return on_rank, expected


NEEDS = "run_ring_reduce_scatter"
ranks.probe(step, "reduce-scatter of 6 numbers", *reduce_scatter(6), NEEDS, WORLD)
ranks.probe(step, "reduce-scatter of 7 numbers: chunks of 3, 2 and 2", *reduce_scatter(7), NEEDS, WORLD)
ranks.probe(step, "all-gather of 6 numbers", *all_gather(6), "run_ring_all_gather", WORLD)
ranks.probe(
    step, "all-gather of 7 numbers: chunks of 3, 2 and 2", *all_gather(7), "run_ring_all_gather", WORLD
)
ranks.probe(step, "all-reduce of 6 numbers", *all_reduce(6), "run_ring_all_reduce", WORLD)
ranks.probe(step, "all-reduce of a 2 x 4 matrix", *all_reduce(2, 4), "run_ring_all_reduce", WORLD)
ranks.probe(
    step,
    "all-reduce of a transposed matrix",
    *all_reduce(2, 4, is_transposed=True),
    "run_ring_all_reduce",
    WORLD,
)
ranks.probe(step, "all-reduce of 2 numbers on three ranks", *all_reduce(2), "run_ring_all_reduce", WORLD)


# --------------------------------------------------------------------------------------------------
# Mistakes


def around():
    return dist.get_rank(), dist.get_world_size()


def scatter_with(first=-1, second=-2, sizes=collectives.chunk_sizes, steps=-1, add=torch.add):
    """A reduce-scatter whose first chunk, next chunks, sizes, number of steps or sum may be wrong."""

    def wrong(tensor):
        rank, world_size = around()
        own = tensor.split(sizes(len(tensor), world_size))
        partial = own[(rank + first) % world_size].clone()
        for k in range(world_size + steps):
            chunk = own[(rank - k + second) % world_size]
            received = torch.empty_like(chunk)
            collectives.exchange(partial, received)
            partial = add(received, chunk)
        return partial

    return wrong


def gather_with(steps=-1, passes_on=True):
    def wrong(chunk, n):
        rank, world_size = around()
        whole = chunk.new_zeros(n)
        chunks = whole.split(collectives.chunk_sizes(n, world_size))
        chunks[rank].copy_(chunk)
        for k in range(world_size + steps):
            sent = chunks[(rank - k) % world_size] if passes_on else chunks[rank]
            received = chunks[(rank - k - 1) % world_size]
            if sent.shape == received.shape:
                collectives.exchange(sent, received)
        return whole

    return wrong


def reduced(tensor):
    """What the tensor must be after an all-reduce."""
    flat = tensor.flatten()
    return right_gather(right_scatter(flat), len(flat)).view_as(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def received_numbers_replace_the_partial_sum(tensor):
    """The chunk received from the left is forwarded without this rank's own numbers, so the result is the
    chunk of one rank. Add the own chunk to each received partial sum."""
    return scatter_with(add=lambda received, chunk: received)(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def partial_sum_not_passed_on(tensor):
    """Each step sends the own chunk instead of the partial sum that arrived, so only two ranks are summed.
    Send in step s what was computed in step s - 1."""
    return scatter_with(add=lambda received, chunk: chunk)(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="public implementations of the ring")
def chunk_of_the_right_neighbor(tensor):
    """The schedule starts at chunk r instead of r - 1, so rank r ends with the chunk of its neighbor r + 1.
    The all-gather expects chunk r; start one chunk earlier."""
    return scatter_with(first=0, second=-1)(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def one_step_too_few(tensor):
    """The loop runs world - 2 times, so each partial sum misses one rank and ends at the neighbor of its
    owner. A chunk must pass through every rank: world - 1 steps."""
    return scatter_with(steps=-2)(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def mean_instead_of_sum(tensor):
    """The result is divided by the number of ranks. A reduce-scatter sums; a caller that needs the
    mean divides afterwards, once."""
    return scatter_with()(tensor) / dist.get_world_size()


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def added_in_place_to_the_input(tensor):
    """Partial sums are written into the chunks of the input, whose numbers are lost for the caller. Receive
    into a buffer and add there."""
    rank, world_size = around()
    own = tensor.split(collectives.chunk_sizes(len(tensor), world_size))
    for k in range(world_size - 1):
        received = torch.empty_like(own[(rank - k - 2) % world_size])
        collectives.exchange(own[(rank - k - 1) % world_size], received)
        own[(rank - k - 2) % world_size].add_(received)
    return own[rank]


@step.mistake("collectives.ring_reduce_scatter", source="public implementations of the ring")
def remainder_dropped(tensor):
    """Every chunk has n // world numbers, and the rest of an uneven tensor is never reduced. Give the first n
    % world chunks one more number."""
    world_size = dist.get_world_size()
    size = len(tensor) // world_size
    return scatter_with(sizes=lambda n, world_size: [size] * world_size)(tensor[: size * world_size])


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def larger_chunks_last(tensor):
    """The numbers that are left over go to the last chunks, where the all-gather expects them in the first
    ones. Both must use the same sizes: the larger chunks first."""
    return scatter_with(sizes=lambda n, world: collectives.chunk_sizes(n, world)[::-1])(tensor)


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def every_rank_sends_everything(tensor):
    """Whole tensors go around the ring, world times as many numbers as are needed, and all but one chunk of
    the sum is thrown away. Send one chunk per step."""
    rank, world_size = around()
    partial, received = tensor.clone(), torch.empty_like(tensor)
    result = tensor.clone()
    for _ in range(world_size - 1):
        collectives.exchange(partial, received)
        partial = received.clone()
        result += received
    return result.split(collectives.chunk_sizes(len(tensor), world_size))[rank].clone()


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def ready_made_reduce(tensor):
    """The sum comes from a ready-made all-reduce, of which one chunk is kept. Here it is to be built from
    send and receive alone."""
    rank, world_size = around()
    whole = tensor.clone()
    dist.all_reduce(whole)
    return whole.split(collectives.chunk_sizes(len(tensor), world_size))[rank]


@step.mistake("collectives.ring_reduce_scatter", source="written for this catalogue")
def every_rank_receives_first(tensor):
    """Every rank waits for its left neighbor before it sends, so no number ever leaves: a deadlock. Start the
    send first, asynchronously, and wait for it after the receive."""
    rank, world_size = around()
    own = tensor.split(collectives.chunk_sizes(len(tensor), world_size))
    received = torch.empty_like(own[(rank - 2) % world_size])
    dist.recv(received, (rank - 1) % world_size)
    dist.send(own[(rank - 1) % world_size], (rank + 1) % world_size)
    return received


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def own_chunk_sent_again(chunk, n):
    """Every step sends the own chunk instead of forwarding the received one, so chunks of distant ranks are
    wrong. Send in step s the chunk received in step s - 1."""
    return gather_with(passes_on=False)(chunk, n)


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def last_step_left_out(chunk, n):
    """The loop ends one step early, so the chunk of the right neighbor is missing on every rank. A chunk
    needs world - 1 steps to reach all ranks."""
    return gather_with(steps=-2)(chunk, n)


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def chunks_in_the_order_of_arrival(chunk, n):
    """Chunks are concatenated in the order of receiving, which differs by rank: own chunk first. Write each
    to the position of its source rank."""
    rank, world_size = around()
    whole = right_gather(chunk, n)
    chunks = whole.split(collectives.chunk_sizes(n, world_size))
    return torch.cat([chunks[(rank - k) % world_size] for k in range(world_size)])


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def chunks_placed_one_rank_off(chunk, n):
    """The chunk received in step s is that of rank r - s - 1, but is stored as chunk r - s + 1: the direction
    of the ring is reversed. Count backward for chunks received from the left."""
    rank, world_size = around()
    whole = right_gather(chunk, n)
    chunks = list(whole.split(collectives.chunk_sizes(n, world_size)))
    others = [k for k in range(world_size) if k != rank]
    swapped = dict(zip(others, others[::-1], strict=True))
    return torch.cat([chunks[swapped.get(k, k)] for k in range(world_size)])


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def own_chunk_forgotten(chunk, n):
    """Only received chunks are written, and the own part of the result stays zero. Copy the own chunk to its
    position first."""
    rank, world_size = around()
    whole = right_gather(chunk, n)
    whole.split(collectives.chunk_sizes(n, world_size))[rank].zero_()
    return whole


@step.mistake("collectives.ring_all_gather", source="written for this catalogue")
def chunks_added_up(chunk, n):
    """Received chunks are added to the present values, as in the reduce-scatter, and the loop runs a step
    longer than needed. The all-gather only copies: chunks are final."""
    rank, world_size = around()
    whole = right_gather(chunk, n)
    whole.split(collectives.chunk_sizes(n, world_size))[rank].mul_(2)
    return whole


@step.mistake("collectives.ring_all_reduce", source="written for this catalogue")
def sum_not_written_back(tensor):
    """The sum is computed on a copy and the tensor keeps its own numbers, as after `tensor = tensor + x`.
    Copy the result into the tensor that was given."""
    reduced(tensor)


@step.mistake("collectives.ring_all_reduce", source="public implementations of the ring")
def mean_over_ranks(tensor):
    """The tensor is divided by the number of ranks. An all-reduce is a sum; averaging gradients is the
    caller's division."""
    tensor.copy_(reduced(tensor) / dist.get_world_size())


@step.mistake("collectives.ring_all_reduce", source="written for this catalogue")
def only_the_own_chunk_reduced(tensor):
    """The all-gather is missing: each rank has one chunk of the sum and its own numbers everywhere else.
    Follow the reduce-scatter by an all-gather."""
    rank, world_size = around()
    flat = tensor.flatten()
    flat.split(collectives.chunk_sizes(len(flat), world_size))[rank].copy_(right_scatter(flat))
    tensor.copy_(flat.view_as(tensor))


@step.mistake("collectives.ring_all_reduce", source="written for this catalogue")
def written_to_a_flattened_copy(tensor):
    """`reshape(-1)` of a transposed tensor is a copy, so the sum never reaches the tensor itself. Write the
    result back with copy_ and the shape of the tensor."""
    flat = tensor.reshape(-1)
    flat.copy_(right_gather(right_scatter(flat), len(flat)))


@step.mistake("collectives.ring_all_reduce", source="written for this catalogue")
def everything_sent_around(tensor):
    """Each rank sends its whole tensor to every other rank: (world - 1) n numbers instead of 2 (world - 1) /
    world n, and more with every rank. Reduce-scatter first, then all-gather."""
    partial = tensor.contiguous().flatten()
    result = partial.clone()
    for _ in range(dist.get_world_size() - 1):
        received = torch.empty_like(partial)
        collectives.exchange(partial, received)
        partial = received
        result += received
    tensor.copy_(result.view_as(tensor))


@step.mistake("collectives.ring_all_reduce", source="written for this catalogue")
def ready_made_all_reduce(tensor):
    """dist.all_reduce does the work. This step is about what it does inside: build it from send and
    receive."""
    whole = tensor.contiguous()
    dist.all_reduce(whole)
    tensor.copy_(whole)
