"""Rendezvous of the processes of a job at each start: a prefix of torchrun's store for this attempt alone.

torchrun 2.15 keeps one store over its restarts. Entries of an earlier attempt, such as the addresses of its
processes, would be read by the next one (`Connection refused`).
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

# polling interval of the main process for joining processes
POLL_SECONDS = 0.02


def meet(patience: timedelta) -> tuple[dist.Store, int, int]:
    """The store of this attempt, and rank and size from torchrun's environment variables."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    return dist.PrefixStore(agree(store, rank, size, patience), store), rank, size


def agree(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A unique name of this attempt, chosen by the main process and received by all.

    Each process registers under a random name of its own, and receives the name of the attempt under that, so
    that stale entries are never read. The number of restarts is not unique: each machine counts its own.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"register/{rank}", name)
        store.wait([f"accept/{name}"], patience)
        attempt = store.get(f"accept/{name}").decode()
        store.set(f"{attempt}/{rank}", "joined")
        return attempt
    end = time.monotonic() + patience.total_seconds()
    missing, accepted = set(range(1, size)), set[str]()
    while missing:
        for other in tuple(missing):
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"register/{other}"]):
                other_name = store.get(f"register/{other}").decode()
                if other_name not in accepted:
                    store.set(f"accept/{other_name}", name)
                    accepted.add(other_name)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} of {size} have not joined the job in {patience}")
        time.sleep(POLL_SECONDS)
    return name
