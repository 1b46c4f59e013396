"""Low-rank adaptation against full fine-tuning: exact answers by rank, from one base run.

uv run python benchmarks/lora.py --base runs/NAME --ranks 1 2 4 8 16 32
"""

import argparse
from pathlib import Path

import post_training
import safetensors

from llm_basics import swap
from llm_basics.runs import run_dir


def trained_parameters(folder: Path) -> int:
    """The number of weights in a checkpoint: of a LoRA run those that are trained."""
    with safetensors.safe_open(run_dir.checkpoints(folder)[0], "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
        return sum(file.get_tensor(name).numel() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    swap.use("fast")
    print("| rank | weights trained | held out | new | s |\n|---|---|---|---|---|")
    for rank in [*arguments.ranks, None]:
        folder = arguments.out / f"rank-{rank or 'full'}"
        options = [] if rank is None else ["--lora.rank", str(rank)]
        seconds = post_training.run("sft", arguments.base, folder, arguments.seed, *options)
        found = post_training.accuracy(folder)
        (exact, n), (new, n_new) = found["all"], found["all new"]
        n_trained = trained_parameters(folder)
        print(
            f"| {rank or 'full'} | {n_trained:,} | {exact} of {n} | {new} of {n_new} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
