"""Training on a folder of text in any script. Alone: uv run pytest tests/test_own_text.py

Words of each script, in sentences of one pattern, give texts that a small model learns in seconds.
"""

import random

import pytest
import torch

from llm_basics.core import config, generate
from llm_basics.inference import engine
from llm_basics.runs import run_dir
from llm_basics.training import job

# subjects, verbs and objects; the Cyrillic and Chinese words as escapes
LATIN = (
    "the cat,the d\u00f6g,a b\u00edrd",
    "sees,l\u00f3ves,finds",
    "the \u00e9clair,a house,the r\u00edver",
)
CYRILLIC = (
    "\u043a\u043e\u0448\u043a\u0430,\u0441\u043e\u0431\u0430\u043a\u0430,\u043f\u0442\u0438\u0446\u0430",
    "\u0432\u0438\u0434\u0438\u0442,\u043b\u044e\u0431\u0438\u0442,\u0438\u0449\u0435\u0442",
    "\u0434\u043e\u043c,\u0440\u0435\u043a\u0443,\u0441\u0430\u0434",
)
CHINESE = (
    "\u732b,\u5c0f\u72d7,\u9e1f",
    "\u770b\u89c1,\u7231,\u627e\u5230",
    "\u623f\u5b50,\u6cb3,\u82b1\u56ed",
)
SCRIPTS = {
    "latin": (LATIN, " ", ". "),
    "cyrillic": (CYRILLIC, " ", ". "),
    "chinese": (CHINESE, "", "\u3002"),
}


def sentences(name):
    """All sentences of a script, each with its end."""
    (subjects, verbs, objects), space, end = SCRIPTS[name]
    words = [part.split(",") for part in (subjects, verbs, objects)]
    return [space.join((s, v, o)) + end for s in words[0] for v in words[1] for o in words[2]]


@pytest.mark.whole_run
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_of_text_is_learned_in_any_script(name, tmp_path):
    known, drawn = sentences(name), random.Random(0)
    (tmp_path / "text").mkdir()
    for i in range(30):
        text = "".join(drawn.choices(known, k=40))
        (tmp_path / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    options = config.Config(
        data=str(tmp_path / "text"),
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "run"),
        val_fraction=0.1,
        fast="off",
        model=config.ModelConfig(vocab_size=300, context_length=24, d_model=32, n_layers=1, n_heads=2),
        train=config.TrainConfig(
            steps=120, batch_size=16, lr=2e-2, warmup_steps=10, eval_every=60, eval_batches=2, device="cpu"
        ),
    )
    assert job.main(options) == 0
    losses = [m["val_loss"] for m in run_dir.read_metrics(tmp_path / "run") if "val_loss" in m]
    assert losses[-1] < 1.5
    lm, chosen = engine.load_run(tmp_path / "run")
    assert all(chosen.decode(chosen.encode(sentence)) == sentence for sentence in known)
    # BPE has merged the bytes of a character, so that a text is shorter in tokens than in bytes
    assert sum(map(len, map(chosen.encode, known))) < len("".join(known).encode()) / 2
    # without its last space, which belongs to the next word
    prompt = torch.tensor(chosen.encode(known[0].rstrip()))
    written = chosen.decode(list(generate.generate(lm, prompt, 30, temperature=0.0)))
    assert "\ufffd" not in written
    assert any(sentence.rstrip() in written for sentence in known), written
