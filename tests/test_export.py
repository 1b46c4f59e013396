"""Export to transformers. Alone: uv run pytest tests/test_export.py"""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import small_models
import torch
import trials

import llm_basics
from llm_basics.cli import commands
from llm_basics.core import config, optim
from llm_basics.core import model as models
from llm_basics.data import chat_template, tokenizer_formats
from llm_basics.interop import hf_config, hf_export, hf_import, hf_weights
from llm_basics.runs import checkpoint, run_dir

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def transformers():
    """The library, offline and without progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("transformers")
        library.utils.logging.disable_progress_bar()
        yield library


def exported(lm, folder, tokenizer=None):
    folder.mkdir(exist_ok=True)
    hf_export.export(lm, tokenizer or small_models.tokenizer(), folder, card="a card\n")
    return folder


def a_run(folder, lm, tokenizer=None, **about):
    """A run directory with config, metrics, tokenizer and two checkpoints."""
    options = dataclasses.replace(config.Config(), model=lm.config, data="/home/username/secret/novels.txt")
    output = run_dir.RunDir(folder)
    output.write_config(dataclasses.asdict(options))
    output.metrics(5, train_loss=3.5, lr=0.1)
    output.metrics(5, val_loss=3.25, perplexity=25.79, bits_per_byte=1.5, accuracy=0.25)
    output.metrics(9, val_loss=3.0)
    output.close()
    (tokenizer or small_models.tokenizer()).save(folder / "tokenizer")
    for step in (5, 9):
        about = {"tokens": 1000 * step, "val_loss": 1.0 + step, "origins": {}} | about
        checkpoint.save_checkpoint(
            lm, optim.AdamW(lm.parameters()), step, run_dir.checkpoint_path(folder, step), **about
        )
    return folder


# --------------------------------------------------------------------------------------------------
# Oracle: transformers


@pytest.mark.parametrize("layout, settings", small_models.SHAPES.values(), ids=small_models.SHAPES)
def test_transformers_gives_the_same_logits_text_and_file(layout, settings, transformers, tmp_path):
    ours = small_models.model(**settings)
    folder = exported(ours, tmp_path / "out")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (theirs.config.model_type, theirs.dtype) == (layout, torch.float32)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.tie_word_embeddings == ours.config.tie_embeddings
    assert theirs.config.vocab_size == ours.config.vocab_size

    tokens = torch.randint(ours.config.vocab_size, (100, 12))
    prompt, n_tokens = tokens[0, :4], trials.count(64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens), rtol=0, atol=1e-5)
        # in training mode, too: no dropout by default
        torch.testing.assert_close(theirs.train()(tokens).logits, ours(tokens), rtol=0, atol=1e-5)
        written = theirs.eval().generate(
            prompt[None], max_new_tokens=n_tokens, do_sample=False, eos_token_id=None
        )
        assert written[0, 4:].tolist() == small_models.greedy(ours, prompt, n_tokens)

    theirs.save_pretrained(tmp_path / "again")
    mine, again = (hf_import.read_tensors(path) for path in (folder, tmp_path / "again"))
    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[name], again[name]) for name in mine)


def test_transformers_gives_the_same_ids(transformers, tmp_path):
    ours = small_models.tokenizer(("<|endoftext|>", "<|pause|>"))
    lm = small_models.model(vocab_size=ours.vocab_size)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(lm, tmp_path / "out", ours))
    texts = [
        "",
        " the then  in\n\n 12 \u00e9",
        "<|endoftext|>the<|pause|> in",
        "<|endoftext|",
        "\U0001f600 'll",
    ]
    for text in texts:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.special_id("<|endoftext|>")
    assert theirs.model_max_length == lm.config.context_length
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == settings.pad_token_id == ours.special_id("<|endoftext|>")


CHATS = [
    [chat_template.Message("user", "the  then?")],
    [
        chat_template.Message("system", "In \u00e9!\n"),
        chat_template.Message("user", " 12 "),
        chat_template.Message("assistant", ""),
    ],
    [
        chat_template.Message("user", "<| the |> \n\n"),
        chat_template.Message("assistant", "in"),
        chat_template.Message("user", "'ll"),
    ],
]


def test_transformers_renders_the_same_chat(transformers, tmp_path):
    ours = chat_template.with_specials(small_models.tokenizer())
    lm = small_models.model(vocab_size=ours.vocab_size)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(lm, tmp_path / "out", ours))

    def rendered(messages, **options):
        return theirs.apply_chat_template(
            [dataclasses.asdict(message) for message in messages], tokenize=True, return_dict=False, **options
        )

    for messages in CHATS:
        assert rendered(messages) == chat_template.render(ours, messages)[0]
        assert rendered(messages, add_generation_prompt=True) == chat_template.render_prompt(ours, messages)
    with pytest.raises(Exception, match="a role must be system, user or assistant, got tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "2"}])
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == [ours.special_id("<|endoftext|>"), ours.special_id("<|end|>")]


def test_a_base_model_has_no_chat_template(tmp_path):
    folder = exported(small_models.model(), tmp_path / "out")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


# --------------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("layout, settings", small_models.SHAPES.values(), ids=small_models.SHAPES)
def test_round_trip_is_bit_for_bit(layout, settings, tmp_path):
    ours = small_models.model(**settings)
    back, found = hf_import.read_model(exported(ours, tmp_path / "out"))
    assert found.model_type == layout
    before, after = ours.state_dict(), back.state_dict()
    for name, tensor in after.items():
        if name not in before:
            assert name.endswith("bias") and not tensor.any(), f"unexpected {name}"
        elif name in ("token_embeddings.weight", "lm_head.weight"):
            assert torch.equal(tensor, before[name][: ours.config.vocab_size])
        else:
            assert torch.equal(tensor, before[name]), name
    assert before.keys() <= after.keys()
    expected = dataclasses.replace(
        ours.config,
        n_kv_heads=back.config.n_kv_heads,
        d_ff=ours.config.d_hidden,
        bias=back.config.bias,
        zero_init=False,
        vocab_multiple=1,
    )
    assert back.config == expected
    assert (back.config.n_kv_heads or back.config.n_heads) == (ours.config.n_kv_heads or ours.config.n_heads)


@pytest.mark.parametrize("seed", range(40))
def test_round_trip_of_random_configs(seed):
    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    generator = torch.Generator().manual_seed(seed)
    _, settings = one_of(*small_models.SHAPES.values())
    n_kv_heads, group, d_head = one_of(1, 2, 3), one_of(1, 2), one_of(2, 4, 6, 10)
    settings = {name: value for name, value in settings.items() if name != "n_kv_heads"}
    if settings.get("position") != "learned":
        settings["n_kv_heads"] = n_kv_heads
    shape = small_models.shape(
        vocab_size=one_of(1, 5, 64),
        d_model=n_kv_heads * group * d_head,
        n_heads=n_kv_heads * group,
        n_layers=one_of(1, 3, 12),
        context_length=one_of(1, 7),
        **(settings | {"d_ff": one_of(1, 8, 17), "tie_embeddings": one_of(False, True)}),
    )
    lm = small_models.randomize_(models.TransformerLM(shape))
    layout = hf_config.find(shape)
    tensors = hf_weights.to_hf(layout, shape, lm.state_dict())
    again, read = hf_config.read_options(hf_config.write_options(layout, shape), "config.json")
    weights = hf_weights.from_hf(again, read, tensors, "here")
    models.TransformerLM(read).load_state_dict(weights)
    for name, tensor in lm.state_dict().items():
        is_padded = name in ("token_embeddings.weight", "lm_head.weight")
        assert torch.equal(weights[name], tensor[: shape.vocab_size] if is_padded else tensor), name
    for name, tensor in hf_weights.to_hf(again, read, weights).items():
        assert torch.equal(tensor, tensors[name]), name


# --------------------------------------------------------------------------------------------------
# Unsupported models


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm_placement": "post"}, "needs model.norm_placement pre, got post"),
        ({"norm_placement": "post", "qk_norm": True}, "qwen3, needs model.norm_placement pre, got post"),
        ({"position": "none"}, "model.position rope, got none"),
        ({"position": "learned"}, "model.position rope, got learned"),
        ({**small_models.GPT2, "n_kv_heads": 2}, "model.n_kv_heads equal to n_heads, got 2"),
        ({**small_models.GPT2, "ffn": "swiglu"}, "model.ffn gelu_tanh, gelu, relu2 or silu, got swiglu"),
        ({"ffn": "silu", "bias": True}, "model.bias False, got True"),
        ({"norm": "layer", "qk_norm": True, "ffn": "gelu"}, "apertus, needs model.norm rms, got layer"),
    ],
)
def test_an_unsupported_model_is_named_and_nothing_is_written(settings, message, tmp_path, capsys):
    folder = a_run(tmp_path / "run", small_models.model(**settings))
    with pytest.raises(SystemExit) as stop:
        hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out")))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert message in error and "train with these options" in error
    assert not list(tmp_path.glob("out*"))


# --------------------------------------------------------------------------------------------------
# The program


def test_the_program_exports_a_run(tmp_path, capsys):
    lm = small_models.model(qk_norm=True)
    folder = a_run(tmp_path / "novelist", lm)
    out = tmp_path / "out"
    out.mkdir()
    assert hf_export.main(commands.ExportConfig(str(folder), out=str(out))) == 0
    assert {path.name for path in out.iterdir()} == FILES
    printed = capsys.readouterr()
    assert "Qwen3ForCausalLM" in printed.out and str(out) in printed.out and not printed.err
    back, _ = hf_import.read_model(out)
    assert all(torch.equal(tensor, lm.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_the_card_describes_the_training_without_local_paths(tmp_path):
    folder = a_run(tmp_path / "novelist", small_models.model(qk_norm=True))
    hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out"), checkpoint="best"))
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# novelist",
        "Qwen3ForCausalLM",
        "| trained on | novels.txt |",
        "| steps | 5 |",
        "| tokens | 5,000 |",
        "| training loss | 3.5000 at step 5 |",
        "| validation loss | 3.2500 nats per token after step 5 |",
        "| bits per byte | 1.5000 |",
        "  qk_norm: true",
        "  batch_size: 16",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert line in card, line
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and b"username" not in content, path.name


@pytest.mark.parametrize("specials", [(), chat_template.SPECIALS], ids=["text", "chat"])
def test_the_example_of_the_card_runs(specials, transformers, tmp_path, capsys):
    tokenizer = small_models.tokenizer(("<|endoftext|>", *specials))
    lm = small_models.model(vocab_size=tokenizer.vocab_size)
    folder = a_run(tmp_path / "run", lm, tokenizer)
    hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    capsys.readouterr()
    exec(code, {})
    prompt = "<|user|>Hello!<|end|><|assistant|>" if specials else "Once"
    assert capsys.readouterr().out.startswith(prompt)
    assert ("A language model that replies to messages" in card) == bool(specials)


@pytest.mark.parametrize("which, step", [("latest", 9), ("best", 5), ("5", 5)])
def test_a_checkpoint_can_be_chosen(which, step, tmp_path, capsys):
    folder = a_run(tmp_path / "run", small_models.model())
    hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out"), checkpoint=which))
    assert f"after step {step}\n" in capsys.readouterr().out
    assert f"| steps | {step} |" in (tmp_path / "out" / "README.md").read_text()


def test_user_code_is_warned_of(tmp_path, capsys):
    folder = a_run(
        tmp_path / "run", small_models.model(), origins={"functional.silu": "mine.py (0123456789ab)"}
    )
    hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out")))
    assert "functional.silu" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["full", "file"])
def test_existing_files_are_not_overwritten(kind, tmp_path, capsys):
    folder = a_run(tmp_path / "run", small_models.model())
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
    kept = out / "kept" if kind == "full" else out
    kept.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        hf_export.main(commands.ExportConfig(str(folder), out=str(out)))
    assert stop.value.code == 2 and "must be new or an empty folder" in capsys.readouterr().err
    assert kept.read_text() == "mine" and sorted(tmp_path.iterdir()) == sorted([folder, out])


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    folder = a_run(tmp_path / "run", small_models.model())
    monkeypatch.setattr(tokenizer_formats, "write_tokenizer_json", no_room)
    with pytest.raises(SystemExit) as stop:
        hf_export.main(commands.ExportConfig(str(folder), out=str(tmp_path / "out")))
    assert stop.value.code == 3 and list(tmp_path.iterdir()) == [folder]


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have the same vocabulary size, got 300 and 263"):
        exported(small_models.model(vocab_size=300), tmp_path)


def test_the_same_run_gives_the_same_files(tmp_path):
    lm = small_models.model(n_kv_heads=2)
    first, second = (exported(lm, tmp_path / name) for name in ("first", "second"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)
    assert json.loads((first / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_package_never_imports_transformers():
    for path in Path(llm_basics.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.split(".")[0] == "transformers" for name in names), path.name
