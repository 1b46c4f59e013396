"""Stages of post-training on the synthetic questions: exact answers to held-out ones, after each stage.

uv run python benchmarks/post_training.py --base runs/NAME           from a run of llm_basics.train
uv run python benchmarks/post_training.py --base runs/NAME --seeds 0 1 2 --stages sft rl more-sft

Each stage is the command that a user runs. `rl` and `dpo` continue the run of `sft`; `more-sft` does so too,
with the learning rate of its end, on as many tokens as `rl` trains on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llm_basics import swap
from llm_basics.data import chat_template, sft_dataset, synthetic_qa
from llm_basics.inference import engine
from llm_basics.runs import run_dir

STAGES = ("sft", "rl", "more-sft", "dpo")


def run(command: str, source: Path, folder: Path, seed: int, *options: str) -> float:
    """Run a command, unless the folder has its result; returns its seconds."""
    if not (folder / "seconds.txt").exists():
        began = time.perf_counter()
        arguments = [
            "--init_from",
            str(source),
            "--run_dir",
            str(folder),
            "--train.seed",
            str(seed),
            *options,
        ]
        subprocess.run(
            [sys.executable, "-m", f"llm_basics.{command}", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (folder / "seconds.txt").write_text(str(time.perf_counter() - began))
    return float((folder / "seconds.txt").read_text())


def accuracy(folder: Path) -> dict[str, list[int]]:
    """Exact greedy answers and questions by kind: held-out ones (`all`), and new ones of no training set."""
    (*_, last) = (event for event in run_dir.read_events(folder) if event["event"] == "accuracy")
    found = {"all": [last["exact"], last["n"]], **last["kinds"]}
    model, tokenizer = engine.load_run(folder)
    questions = synthetic_qa.new_pairs("test")
    prompts = [
        torch.tensor(chat_template.render_prompt(tokenizer, sft_dataset.as_messages(pair)[:1]))
        for pair in questions
    ]
    # in batches of similar lengths
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    counts: dict[str, list[int]] = {}
    for some in (order[i : i + 256] for i in range(0, len(order), 256)):
        given = [prompts[index] for index in some]
        replies = engine.generate_batch(
            model, given, 24, temperature=0.0, stop_id=tokenizer.special_id(chat_template.END)
        )
        for index, reply in zip(some, replies, strict=True):
            for name in (f"new {questions[index].kind}", "all new"):
                count = counts.setdefault(name, [0, 0])
                count[0] += tokenizer.decode(reply) == questions[index].answer
                count[1] += 1
    return found | dict(sorted(counts.items()))


def trained_tokens(folder: Path) -> int:
    """Tokens in forward and backward passes, from the speed and the seconds of the recorded steps."""
    steps = [entry for entry in run_dir.read_metrics(folder) if "tokens_per_second" in entry]
    per_step = median(entry["tokens_per_second"] * entry["step_seconds"] for entry in steps)
    return round(per_step * steps[-1]["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/post_training"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rl", nargs="*", default=[], metavar="NAME=VALUE", help="options of rl")
    arguments = parser.parse_args()
    swap.use("fast")
    rl_options = [f"--{option}" for option in arguments.rl]
    found: dict[str, list[dict[str, list[int]]]] = {stage: [] for stage in arguments.stages}
    for seed in arguments.seeds:
        folders = {stage: arguments.out / f"{stage}-{seed}" for stage in STAGES}
        for stage in arguments.stages:
            folder = folders[stage]
            if stage == "sft":
                seconds = run("sft", arguments.base, folder, seed)
            elif stage == "more-sft":
                n_steps = round(trained_tokens(folders["rl"]) * 600 / trained_tokens(folders["sft"]))
                rate = ["--train.lr", "2e-3", "--train.steps", str(n_steps)]
                seconds = run("sft", folders["sft"], folder, seed, *rate)
            else:
                seconds = run(stage, folders["sft"], folder, seed, *(rl_options if stage == "rl" else []))
            found[stage].append(accuracy(folder))
            tokens, held_out, new = (
                trained_tokens(folder),
                *(found[stage][-1][name] for name in ("all", "all new")),
            )
            print(
                f"seed {seed}  {stage:9} {held_out[0]} of {held_out[1]}, new {new[0]} of {new[1]}  "
                f"{tokens:,} tokens  {seconds:.0f} s",
                flush=True,
            )
    kinds = list(found[arguments.stages[0]][0])
    print("\n" + " | ".join(["kind", "questions", *arguments.stages]))
    for kind in kinds:
        row = [kind, str(found[arguments.stages[0]][0][kind][1])]
        for stage in arguments.stages:
            exact = [each[kind][0] for each in found[stage]]
            row.append(f"{np.mean(exact):.1f} ({', '.join(map(str, exact))})")
        print(" | ".join(row))
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
