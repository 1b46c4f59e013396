"""Programs that test_parallel.py runs on two ranks: a transformer trained by each piece of systems."""

import contextlib
import os
import time

import torch
import torch.distributed as dist

from llm_basics.core import config, model, optim
from llm_basics.core import functional as F

STEPS = 3
CONFIG = config.ModelConfig(
    vocab_size=19, context_length=8, d_model=16, n_layers=2, n_heads=2, d_ff=24, tie_embeddings=True
)


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return model.TransformerLM(CONFIG, dtype=dtype)


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(19, (4, 9), generator=generator) for _ in range(STEPS)]


def share(tokens):
    return tokens.tensor_split(dist.get_world_size())[dist.get_rank()]


def loss_of(lm, tokens):
    return F.cross_entropy(lm(tokens[:, :-1]), tokens[:, 1:])


def groups_of(lm):
    """Groups as in training: matrices with weight decay, vectors without."""
    return [
        {"params": [p for p in lm.parameters() if p.dim() > 1]},
        {"params": [p for p in lm.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def weights_of(lm):
    return {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}


def train(lm, optimizer, after_backward=lambda: None, share=lambda tokens: tokens):
    """The loss of each step."""
    losses = []
    for tokens in batches():
        optimizer.zero_grad()
        loss = loss_of(lm, share(tokens))
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def alone(dtype=torch.float64):
    """What one process gives on whole batches."""
    lm = make_model(dtype)
    losses = train(lm, optim.AdamW(groups_of(lm), lr=0.01))
    return losses, weights_of(lm)


def data_parallel(a):
    lm = make_model()
    ddp = a.get_ddp(lm)
    optimizer = optim.AdamW(groups_of(lm), lr=0.01)
    train(ddp, optimizer, lambda: a.ddp_on_after_backward(ddp, optimizer), share)
    return {"weights": weights_of(lm)}


def accumulated(a):
    """Each share in two batches, of which the first is not synchronized."""
    lm = make_model()
    ddp = a.get_ddp(lm)
    optimizer = optim.AdamW(groups_of(lm), lr=0.01)
    for tokens in batches():
        optimizer.zero_grad()
        for k, part in enumerate(share(tokens).split(1)):
            with ddp.no_sync() if k == 0 else contextlib.nullcontext():
                (loss_of(ddp, part) / 2).backward()
        a.ddp_on_after_backward(ddp, optimizer)
        optimizer.step()
    return {"weights": weights_of(lm)}


def sharded_optimizer(a):
    lm = make_model()
    ddp = a.get_ddp(lm)
    optimizer = a.get_sharded_optimizer(groups_of(lm), optim.AdamW, lr=0.01)
    train(ddp, optimizer, lambda: a.ddp_on_after_backward(ddp, optimizer), share)
    return {"weights": weights_of(lm)}


def muon(a):
    """Muon over whole matrices, each on its owner."""
    lm = make_model()
    ddp = a.get_ddp(lm)
    matrices = {"params": [p for p in lm.layers.parameters() if p.dim() == 2], "momentum": 0.95}
    rest = {"params": [p for p in lm.parameters() if not any(p is q for q in matrices["params"])]}
    optimizer = a.get_sharded_optimizer([matrices, rest], optim.Muon, lr=0.01)
    train(ddp, optimizer, lambda: a.ddp_on_after_backward(ddp, optimizer), share)
    return {"weights": weights_of(lm)}


def muon_alone():
    lm = make_model()
    matrices = {"params": [p for p in lm.layers.parameters() if p.dim() == 2], "momentum": 0.95}
    rest = {"params": [p for p in lm.parameters() if not any(p is q for q in matrices["params"])]}
    train(lm, optim.Muon([matrices, rest], lr=0.01))
    return weights_of(lm)


def fsdp(a):
    lm = make_model(torch.float32)
    groups = groups_of(lm)
    decayed = {name for name, p in lm.named_parameters() if any(p is q for q in groups[0]["params"])}
    wrapped = a.get_fsdp(lm)
    # shards are flat, so what is decayed is decided before
    shards = dict(lm.named_parameters())
    groups[0]["params"] = [part for name, part in shards.items() if name in decayed]
    groups[1]["params"] = [part for name, part in shards.items() if name not in decayed]
    optimizer = optim.AdamW(groups, lr=0.01)
    train(wrapped, optimizer, lambda: a.fsdp_on_after_backward(wrapped, optimizer), share)
    return {"weights": dict(a.fsdp_gather_full_params(wrapped))}


def fsdp_in_half(a):
    lm = make_model(torch.float32)
    wrapped = a.get_fsdp(lm, torch.bfloat16)
    optimizer = optim.AdamW(wrapped.parameters(), lr=0.01)
    losses = train(wrapped, optimizer, lambda: a.fsdp_on_after_backward(wrapped, optimizer))
    return {"losses": losses}


def tensor_parallel(a):
    """Every rank has the whole batch, and a part of each feed-forward network."""
    lm = make_model()
    for block in lm.layers:
        block.ffn = a.get_tensor_parallel_swiglu(block.ffn)
    optimizer = optim.AdamW(groups_of(lm), lr=0.01)
    losses = train(lm, optimizer)
    return {"losses": losses, "weights": weights_of(lm)}


# --------------------------------------------------------------------------------------------------
# What ranks may do wrong


def wait_for_ever(a):
    if dist.get_rank() == 1:
        dist.barrier()
    return {"rank": dist.get_rank()}


def busy(a):
    """Much longer at work, and asleep in between, than a hang takes to be found."""
    deadline = time.perf_counter() + 3
    while time.perf_counter() < deadline:
        time.sleep(0.05)
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            pass
    dist.barrier()
    return {"rank": dist.get_rank()}


def endless(a):
    while True:
        pass


def crash(a):
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def environment(a):
    return {
        "threads": torch.get_num_threads(),
        "world": dist.get_world_size(),
        "process": os.getpid(),
    }
