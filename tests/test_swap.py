"""The seam between reference and fast implementations. uv run pytest tests/test_swap.py"""

import inspect
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import regex
import torch

import llm_basics
from llm_basics import swap
from llm_basics.core import bpe, config, model, presets, tokenizer, trainer
from llm_basics.core import functional as F
from llm_basics.data import prepare
from llm_basics.fast import numba_jit
from llm_basics.training import user_model

ROOT = Path(__file__).parent.parent

FUNCTIONS = [
    *("linear", "embedding", "gelu", "silu", "swiglu", "relu2", "rms_norm", "layer_norm"),
    *("apply_rope", "scaled_dot_product_attention", "cross_entropy"),
]


def test_fast_implementations_have_the_signature_of_their_reference():
    for piece, fast in swap._fast_implementations():
        name, reference = piece.split(".")[1], swap.reference(piece)
        assert list(inspect.signature(fast).parameters) == list(inspect.signature(reference).parameters), name
        for method, own in vars(fast).items() if inspect.isclass(fast) else ():
            if not method.startswith("_") and inspect.isfunction(own):
                expected = inspect.signature(getattr(reference, method)).parameters
                assert list(inspect.signature(own).parameters) == list(expected), method


def test_which_pieces_have_a_fast_implementation():
    names = {"bpe.count_pretokens", "bpe.learn_merges", "bpe.train_bpe", "tokenizer.Tokenizer"}
    names |= {f"functional.{name}" for name in FUNCTIONS}
    names |= {"dataloader.Batches", "optim.adamw_step_", "optim.clip_grad_norm_", "optim.muon_step_"}
    names |= {"trainer.batch_loss", "trainer.train_step", "optim.orthogonalize", "evaluate.batch_metrics"}
    names |= {"layers.MultiHeadSelfAttention", "generate.generate", "generate.next_token_probabilities"}
    assert {piece for piece, _ in swap._fast_implementations()} == names
    assert not any(origin.startswith("llm_basics.fast.") for origin in swap.origins().values())


def test_fast_implementations_are_used_within_the_block():
    before = bpe.train_bpe, tokenizer.Tokenizer
    with pytest.raises(RuntimeError), swap.using("fast", lambda line: None):
        assert bpe.train_bpe is not before[0]
        assert swap.origins()["bpe.train_bpe"] == "llm_basics.fast.bpe"
        assert type(tokenizer.Tokenizer.byte_level()).__module__ == "llm_basics.fast.tokenizer"
        raise RuntimeError("the block ends early")
    assert (bpe.train_bpe, tokenizer.Tokenizer) == before


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import torch", "from llm_basics import swap"])
def test_modules_loaded_later_are_fast_too(first):
    program = f"""{first}
from llm_basics import swap
swap.use("fast", lambda line: None)
from llm_basics.core import tokenizer, trainer
print(trainer.train_step.__module__, tokenizer.Tokenizer.__module__)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["llm_basics.fast.trainer", "llm_basics.fast.tokenizer"], done.stderr


def test_a_piece_that_somebody_put_there_stays(monkeypatch):
    def train_bpe(*args):
        return {}, []

    monkeypatch.setattr(bpe, "train_bpe", train_bpe)
    with swap.using("fast", lambda line: None):
        assert bpe.train_bpe is train_bpe
        assert bpe.learn_merges.__module__ == "llm_basics.fast.bpe"
    assert bpe.train_bpe is train_bpe


def test_a_name_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="must be fast or a Python file .*, got 'quick'"):
        swap.use("quick")


def test_a_pattern_without_a_scanner_is_learned_and_used_as_by_the_reference(tmp_path):
    path = tmp_path / "text"
    path.write_text("one-two three-four one-two " * 20)
    pattern = regex.compile(r"\w+|\W+")
    expected = bpe.train_bpe(path, 280, pattern=pattern)
    ids = tokenizer.Tokenizer(*expected, pattern=pattern).encode("one-two four")
    with swap.using("fast", lambda line: None):
        assert bpe.train_bpe(path, 280, pattern=pattern) == expected
        assert tokenizer.Tokenizer(*expected, pattern=pattern).encode("one-two four") == ids


def test_prepared_files_are_the_same_with_and_without_fast(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"text {i}: " + "a few words, and caf\u00e9s " * (i + 1))
    written = {}
    for fast in ("on", "off"):
        model = config.ModelConfig(vocab_size=300, context_length=8)
        options = config.Config(data=str(texts), data_dir=str(tmp_path / fast), fast=fast, model=model)
        folder = prepare.prepare(options, lambda line: None).folder
        written[fast] = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert written["on"] == written["off"]
    assert len(written["on"]) >= 5


def test_yaml_may_say_on_and_off():
    assert presets.update(config.Config(), {"fast": False}, "a test").fast == "off"
    assert presets.update(config.Config(), {"fast": True}, "a test").fast == "on"


def test_kernels_are_compiled_again_when_any_source_changes(tmp_path):
    shutil.copytree(Path(llm_basics.__file__).parent, tmp_path / "llm_basics")
    script = "from llm_basics.fast import kernel_cache; print(kernel_cache.folder())"

    def folder() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = folder()
    assert str(tmp_path) in before
    with open(tmp_path / "llm_basics" / "fast" / "text" / "merge.py", "a") as file:
        file.write("# changed\n")
    assert folder() != before


def test_the_kernel_cache_of_this_version_is_found():
    fast_tokenizer = __import__("llm_basics.fast.tokenizer", fromlist=["Tokenizer"])
    fast_tokenizer.Tokenizer.byte_level().encode("compiled now at the latest")
    # whatever was compiled before
    numba_jit.used_before.cache_clear()
    assert numba_jit.used_before()


# --------------------------------------------------------------------------------------------------
# User code


@pytest.fixture
def mine(tmp_path):
    """Write a file of pieces; whatever is used of it, all is as before when the test ends."""

    def write(source):
        path = tmp_path / "mine.py"
        path.write_text("import torch\nfrom torch import nn\n" + source)
        return path

    with swap.restored():
        yield write


HALF = "def softmax(x, dim=-1):\n    return torch.full_like(x, 0.5)\n"


def test_own_pieces_are_called_from_inside_too(mine):
    q = torch.randn(2, 3, 4)
    swap.use(mine(HALF))
    assert torch.equal(F.softmax(q), torch.full_like(q, 0.5))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), 0.5 * q.sum(1, True).expand_as(q))
    origin = swap.origins()["functional.softmax"]
    assert origin.startswith("mine.py (") and swap.user_pieces() == {"functional.softmax": origin}
    assert swap.describe() == f"softmax from {origin}; reference code for the rest"


def test_any_subset_and_kind_of_piece_can_be_replaced(mine):
    source = (
        "class Linear(nn.Module):\n"
        "    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.ones(out_features, in_features))\n"
        "    def forward(self, x):\n"
        "        return x @ self.weight.T\n"
        "def cosine_schedule(step, max_lr, min_lr, warmup_steps, total_steps):\n    return 0.125\n"
        "class AdamW(torch.optim.SGD):\n"
        "    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):\n"
        "        super().__init__(params, lr)\n"
    )
    swap.use(mine(source))
    tiny = config.ModelConfig(vocab_size=11, context_length=4, d_model=8, n_layers=1, n_heads=2)
    lm = model.TransformerLM(tiny)
    assert (lm.lm_head.weight == 1).all() and (lm.layers[0].attn.q_proj.weight == 1).all()
    optimizer = trainer.make_optimizer(lm, config.TrainConfig())
    assert isinstance(optimizer, torch.optim.SGD)
    batch = torch.zeros(2, 4, dtype=torch.long)
    assert trainer.train_step(lm, optimizer, [(batch, batch)], 1, config.TrainConfig()).lr == 0.125


def test_what_a_class_lacks_is_the_reference_s(mine):
    source = (
        "from llm_basics.core import layers\n"
        "class TransformerLM(nn.Module):\n"
        "    def __init__(self, config, device=None, dtype=None):\n"
        "        super().__init__()\n"
        "        self.config = config\n"
        "        self.lm_head = layers.Linear(3, 5)\n"
        "    def forward(self, tokens, token_positions=None, caches=None):\n        return tokens\n"
    )
    swap.use(mine(source))
    assert model.TransformerLM(config.ModelConfig()).n_parameters() == 15


def test_own_tokenizer_does_the_work_and_the_reference_the_files(mine, tmp_path):
    source = (
        "class Tokenizer:\n"
        "    def __init__(self, vocab, merges, special_tokens=None):\n        self.vocab = vocab\n"
        "    def encode(self, text):\n        return [ord(c) + 1 for c in text]\n"
        "    def decode(self, ids):\n        return ''.join(chr(i - 1) for i in ids)\n"
    )
    swap.use(mine(source))
    made = tokenizer.Tokenizer.byte_level()
    assert made.encode("ab") == made.encode_ordinary("ab") == [98, 99]
    assert made.decode([98, 99]) == "ab" and made.encode_batch(["a"]) == [[98]]
    made.save(tmp_path / "saved")
    assert tokenizer.Tokenizer.load(tmp_path / "saved").encode("ab") == [98, 99]


def test_a_parameter_that_is_left_out_is_missed_only_when_it_is_needed(mine):
    swap.use(mine("def cross_entropy(logits, targets):\n    return logits.sum()\n"))
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    assert F.cross_entropy(logits, targets, -100, z_loss=0.0, reduction="mean") == 0
    message = "cross_entropy of .*mine.py has no parameter reduction, but is called with 'sum'; add it"
    with pytest.raises(ValueError, match=message):
        F.cross_entropy(logits, targets, reduction="sum")
    with pytest.raises(ValueError, match="no parameter ignore_index, but is called with 2"):
        F.cross_entropy(logits, targets, 2)
    # one in the middle
    swap.use(mine("def cross_entropy(logits, targets, reduction='mean'):\n    return reduction\n"))
    assert F.cross_entropy(logits, targets, -100, 0.0, "sum") == "sum"
    with pytest.raises(ValueError, match="no parameter z_loss, but is called with 0.5; add it"):
        F.cross_entropy(logits, targets, z_loss=0.5)


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "def softmax(x, axis):\n    pass\n",
            r"yours +softmax\(x, axis\)\n +reference +softmax\(x, dim=-1\)",
        ),
        ("def softmax(x, axis=-1):\n    pass\n", r"yours +softmax\(x, axis=-1\)"),
        ("def softmax(x, dim, more):\n    pass\n", "must have the parameters of the reference"),
        ("def softmax():\n    pass\n", "must have the parameters of the reference"),
        ("class softmax:\n    pass\n", "softmax of .*mine.py must be a function"),
        ("def Linear(x):\n    pass\n", "Linear of .*mine.py must be a class"),
        (
            "class RMSNorm(nn.Module):\n    def forward(self, y):\n        pass\n",
            r"RMSNorm.forward\(self, x\)",
        ),
        ("def softmax(x, dim=-1:\n", r"mine.py:3 is not Python"),
        ("import math\n\n1 / 0\ndef silu(x):\n    pass\n", "mine.py:5 could not be run: ZeroDivisionError"),
        ("def my_softmax(x):\n    pass\n", "must define a piece .such as softmax or RMSNorm., got none"),
        (
            "from llm_basics.core.functional import softmax\n",
            "must define softmax itself, but imports it from llm_basics.withheld",
        ),
        (
            "from llm_basics.core import functional\nsoftmax = functional.softmax\n",
            "must define softmax itself",
        ),
    ],
)
def test_mismatched_pieces_raise_and_nothing_is_replaced(mine, source, message):
    before = swap.origins()
    with pytest.raises(ValueError, match=message):
        swap.use(mine(source))
    assert swap.origins() == before


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no .*none.py"):
        swap.use(tmp_path / "none.py")
    (tmp_path / "bytes.py").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="bytes.py.* is not Python"):
        swap.use(tmp_path / "bytes.py")


def test_the_reference_of_a_defined_piece_is_withheld(mine):
    source = "from llm_basics.core import functional as F\nhidden = F.softmax\n"
    swap.use(mine(source + "def softmax(x, dim=-1):\n    return hidden(x, dim)\n"))
    with pytest.raises(ValueError, match="calls the reference functional.softmax; implement softmax itself"):
        F.softmax(torch.ones(2))


def test_imported_pieces_are_not_used_and_logged(mine):
    logged = []
    with pytest.raises(ValueError, match="got none"):
        swap.use(mine("from torch.nn.functional import softmax\n"), logged.append)
    assert "softmax of" in logged[0] and "not used: it is imported from torch.nn.functional" in logged[0]


@pytest.mark.parametrize("order", ["first", "second"])
def test_user_code_wins_over_fast_implementations(mine, order):
    path = mine("def train_bpe(input_path, vocab_size, special_tokens=()):\n    return {}, []\n")
    if order == "first":
        swap.use(path)
    with swap.using("fast", lambda line: None):
        if order == "second":
            swap.use(path)
        assert bpe.train_bpe("nothing", 300, [], progress=print) == ({}, [])
        assert bpe.learn_merges.__module__ == "llm_basics.fast.bpe"


def test_keys_of_old_runs_map_to_the_current_ones():
    assert swap.piece("session.make_optimizer") == "trainer.make_optimizer"
    assert swap.piece("functional.silu") == "functional.silu" and swap.piece("bpe.gone") == "bpe.gone"


def test_a_fast_implementation_that_would_bypass_user_code_is_off_and_logged(mine):
    logged = []
    swap.use(mine("def learn_merges(pretokens, vocab_size, special_tokens):\n    return {7: b'mine'}, []\n"))
    with swap.using("fast", logged.append):
        assert bpe.train_bpe.__module__ == "llm_basics.core.bpe"
        assert bpe.count_pretokens.__module__ == "llm_basics.fast.bpe"
    assert logged[-1] == "train_bpe: reference code is used, a fast kernel would bypass your bpe.learn_merges"


def test_prepared_tokens_are_made_again_by_another_tokenizer(mine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    shape = config.ModelConfig(vocab_size=270, context_length=8)
    options = config.Config(data=str(text), data_dir=str(tmp_path / "data"), fast="off", model=shape)
    usual = prepare.prepare(options, lambda line: None).folder
    swap.use(
        mine("def pretokenize(text, special_tokens=(), pattern=None):\n    raise RuntimeError('mine')\n")
    )
    with pytest.raises(RuntimeError, match="mine"):
        prepare.prepare(options, lambda line: None)
    assert usual.exists()


# --------------------------------------------------------------------------------------------------
# Files as people write them


@pytest.mark.parametrize(
    "source",
    [
        "if True:\n    def silu(x):\n        return x + 1\n",
        "try:\n    silu = lambda x: x + 1\nexcept ImportError:\n    pass\n",
        "from typing import Any\nsilu: Any = lambda x: x + 1\n",
        "silu, other = (lambda x: x + 1), 3\n",
        "def add(x):\n    return x + 1\ndef silu(x):\n    return add(x)\n",
        "from __future__ import annotations\ndef silu(x: Tensor) -> Tensor:\n    return x + 1\n",
        "def silu(x):\n    from helper import add\n    return add(x)\n",
        "def silu(x, **more):\n    return x + 1\n",
    ],
)
def test_a_piece_is_found_however_it_is_bound(tmp_path, source):
    (tmp_path / "helper.py").write_text("def add(x):\n    return x + 1\n")
    path = tmp_path / "mine.py"
    path.write_bytes(b"\xef\xbb\xbf" + source.replace("\n", "\r\n").encode())
    with swap.using(path):
        assert F.silu(torch.tensor(1.0)) == 2


@pytest.mark.parametrize(
    "source, message",
    [
        ("import sys\nsys.exit()\n", "mine.py:4 could not be run: SystemExit"),
        ("from .helper import f\n", "write `from helper import f`"),
        ("silu = 3\n", "must define a piece"),
        ("def silu(x):\n    return x\ndel silu\n", "must define a piece"),
        ("def softmax(x, dim):\n    return x\n", "must have the parameters of the reference"),
        ("def softmax(x, *, dim=-1):\n    return x\n", "must have the parameters of the reference"),
        (
            "from llm_basics.core import layers\nclass Linear(layers.Linear):\n    pass\n",
            "calls the reference",
        ),
    ],
)
def test_odd_files_raise_a_clear_error(mine, source, message):
    with pytest.raises(ValueError, match=message):
        swap.use(mine(source), lambda line: None)


def test_a_file_that_is_saved_twice_in_a_second_is_read_twice(mine):
    for sign, result in (("+", 1.0), ("-", -1.0)):
        swap.use(mine(f"def silu(x):\n    return {sign}x\n"))
        assert F.silu(torch.tensor(1.0)) == result


def test_what_stands_beside_a_file_is_its_code_too(mine, tmp_path):
    origins = []
    for number in (1, 2):
        (tmp_path / "numbered.py").write_text(f"number = {number}\n")
        swap.use(mine("import numbered\ndef silu(x):\n    return x * numbered.number\n"))
        assert F.silu(torch.tensor(1.0)) == number
        origins.append(swap.origins()["functional.silu"])
    assert origins[0] != origins[1]


def test_inherited_and_decorated_methods_of_a_tokenizer_are_used(mine):
    source = (
        "import functools\n"
        "class Base:\n"
        "    def __init__(self, vocab, merges, special_tokens=None):\n        pass\n"
        "    @functools.lru_cache\n"
        "    def encode(self, text):\n        return [7]\n"
        "class Tokenizer(Base):\n    pass\n"
    )
    swap.use(mine(source))
    made = tokenizer.Tokenizer.byte_level()
    assert made.encode("abc") == [7]
    assert pickle.loads(pickle.dumps(made)).encode("abc") == [7]


def test_a_fast_implementation_in_use_gives_way_to_user_code_for_its_parts(mine):
    with swap.using("fast", lambda line: None):
        swap.use(mine("def learn_merges(pretokens, vocab_size, special_tokens):\n    return {}, []\n"))
        assert bpe.train_bpe.__module__ == "llm_basics.core.bpe"


def test_a_model_whose_parameters_do_not_match_the_config_raises(mine):
    source = (
        "from llm_basics.core import layers\n"
        "class TransformerLM(nn.Module):\n"
        "    def __init__(self, config, device=None, dtype=None):\n"
        "        super().__init__()\n"
        "        self.config = config\n"
        "        self.lm_head = layers.Linear(config.d_model, 7)\n"
        "    def forward(self, tokens, token_positions=None, caches=None):\n        return tokens\n"
    )
    swap.use(mine(source))
    shape = config.ModelConfig(n_layers=1)
    with pytest.raises(ValueError, match=r"layers\.0"):
        user_model.check_parameters(model.TransformerLM(shape), shape)
