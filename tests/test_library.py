"""The example of docs/library.md runs as written. Alone: uv run pytest tests/test_library.py"""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_example_in_python_trains_a_model_and_samples_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(compile(example[1], str(PAGE), "exec"), names)
    losses = names["training"].losses
    assert len(losses) == 50 and losses[-1] < 0.7 * losses[0]
    first, _, text = capsys.readouterr().out.partition("\n")
    assert first == f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    assert len(text.strip()) > 50
    assert not list(tmp_path.iterdir()), "the example writes no files"
