"""The first example of README's "In Python" runs as written. Alone: uv run pytest tests/test_readme.py"""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_in_python_trains_a_model_and_samples_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    section = README.read_text(encoding="utf-8").split("\n## In Python\n")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(compile(example[1], str(README), "exec"), names)
    losses = names["training"].losses
    assert len(losses) == 50 and losses[-1] < 0.7 * losses[0]
    first, _, text = capsys.readouterr().out.partition("\n")
    assert first == f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    assert len(text.strip()) > 50
    assert not list(tmp_path.iterdir()), "the example writes no files"
