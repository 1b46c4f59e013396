"""The meeting of the processes of a job, at each start: a part of torchrun's store that only they use.

torchrun 2.15 keeps one store over its restarts. What an earlier attempt wrote there, such as the addresses of
its processes, would be read by the next one (`Connection refused`).
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

# between two looks of the main process at who has come
LOOK_SECONDS = 0.02


def meet(patience: timedelta) -> tuple[dist.Store, int, int]:
    """The store of this attempt, and rank and size of the job that torchrun describes in the environment."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=patience)))
    return dist.PrefixStore(agree(store, rank, size, patience), store), rank, size


def agree(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A name that all processes of this attempt agree on, and none before had.

    The main process answers each of the others by the name that this one has made up for itself, so that an
    old message is never taken for a new one. The number of restarts would not do: each machine has its own.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", name)
        store.wait([f"answer/{name}"], patience)
        agreed = store.get(f"answer/{name}").decode()
        store.set(f"{agreed}/{rank}", "heard")
        return agreed
    end = time.monotonic() + patience.total_seconds()
    missing, answered = set(range(1, size)), set[str]()
    while missing:
        for other in tuple(missing):
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"here/{other}"]):
                theirs = store.get(f"here/{other}").decode()
                if theirs not in answered:
                    store.set(f"answer/{theirs}", name)
                    answered.add(theirs)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} of {size} have not joined the job in {patience}")
        time.sleep(LOOK_SECONDS)
    return name
