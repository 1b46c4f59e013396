"""Import of models of transformers. Alone: uv run pytest tests/test_import_model.py"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import small_models
import torch

from llm_basics.cli import commands
from llm_basics.core import config, trainer, vocabulary
from llm_basics.data import tokenizer_formats
from llm_basics.inference import engine, samples
from llm_basics.interop import hf_export, hf_import
from llm_basics.runs import run_dir

SIZES = {"vocab_size": small_models.tokenizer().vocab_size, "bos_token_id": None, "eos_token_id": None}
GPT2 = {**SIZES, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    **SIZES,
    "max_position_embeddings": 80,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}

HF_MODELS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": (
        "gpt2",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-gelu": ("gpt2", {**GPT2, "activation_function": "gelu"}),
    "llama": ("llama", LLAMA),
    "llama-theta": ("llama", {**LLAMA, "rope_parameters": ROPE, "rms_norm_eps": 1e-3}),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8}),
    "qwen3-tied": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "arcee": ("arcee", {**LLAMA, "hidden_act": "silu"}),
    "apertus": ("apertus", {**LLAMA, "hidden_act": "relu2", "rope_parameters": ROPE}),
    "starcoder2": ("starcoder2", LLAMA),
    "starcoder2-untied": ("starcoder2", {**LLAMA, "tie_word_embeddings": False, "hidden_act": "gelu"}),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that makes a random model of transformers and saves it to a folder; returns both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("transformers")
        library.utils.logging.disable_progress_bar()

        def make_model(model_type, settings, dtype=torch.float32, **saving):
            torch.manual_seed(0)
            described = library.AutoConfig.for_model(model_type, **settings)
            theirs = library.AutoModelForCausalLM.from_config(described, attn_implementation="eager")
            small_models.randomize_(theirs).to(dtype)
            folder = tmp_path_factory.mktemp(model_type)
            theirs.save_pretrained(folder, **saving)
            tokenizer_formats.write_tokenizer_json(
                small_models.tokenizer().to_vocabulary(), folder / "tokenizer.json"
            )
            return theirs, folder

        yield make_model


@pytest.fixture(scope="module")
def llama(make):
    return make("llama", LLAMA)


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of a folder of transformers, to modify."""
    return Path(shutil.copytree(llama[1], tmp_path / "theirs"))


def imported(folder, out, **options):
    assert hf_import.main(commands.ImportConfig(str(folder), str(out), **options)) == 0
    return engine.load_run(out)


def refused(folder, capsys, **options):
    """The error message of an import that fails."""
    out = folder.parent / "out"
    with pytest.raises(SystemExit) as stop:
        hf_import.main(commands.ImportConfig(str(folder), str(out), **options))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and not printed.out
    assert not list(folder.parent.glob("out*")), "files were left"
    return printed.err


def change(folder, **options):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | options).items() if v is not ...}))


def change_tensors(folder, spoil):
    tensors = hf_import.read_tensors(folder)
    spoil(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_same_logits(ours, theirs, atol=1e-5):
    tokens = torch.randint(SIZES["vocab_size"], (100, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------
# Oracle: transformers


@pytest.mark.parametrize("model_type, settings", HF_MODELS.values(), ids=HF_MODELS)
def test_an_imported_model_has_the_same_logits_and_exports_unchanged(model_type, settings, make, tmp_path):
    theirs, folder = make(model_type, settings)
    ours, tokenizer = imported(folder, tmp_path / "run")
    assert_same_logits(ours, theirs)
    assert tokenizer.fingerprint() == small_models.tokenizer().fingerprint()

    (tmp_path / "again").mkdir()
    layout = hf_export.export(ours, tokenizer, tmp_path / "again", "a card")
    # Mistral without a sliding window equals Llama
    assert layout.model_type == ("llama" if model_type == "mistral" else model_type)
    before, after = hf_import.read_tensors(folder), hf_import.read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_in_several_files(make, tmp_path):
    theirs, folder = make("qwen3", {**LLAMA, "head_dim": 8}, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_logits(imported(folder, tmp_path / "run")[0], theirs)


def test_a_gpt2_with_old_names_without_prefix(make, tmp_path):
    theirs, folder = make("gpt2", GPT2)

    def as_before(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 80, 80).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change_tensors(folder, as_before)
    change(folder, tie_word_embeddings=..., n_inner=..., n_ctx=80)
    assert_same_logits(imported(folder, tmp_path / "run")[0], theirs)


def test_a_llama_with_old_option_names(folder, llama, tmp_path):
    change(folder, rope_parameters=..., head_dim=..., attention_bias=..., mlp_bias=..., rope_theta=10000.0)
    change_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert_same_logits(imported(folder, tmp_path / "run")[0], llama[0])


def test_half_precision_is_widened_exactly(make, tmp_path):
    theirs, folder = make("llama", LLAMA, dtype=torch.bfloat16)
    ours, _ = imported(folder, tmp_path / "run")
    assert ours.lm_head.weight.dtype == torch.float32
    # loaded again: converting the dtype of the whole model would also round its RoPE frequencies
    assert_same_logits(ours, type(theirs).from_pretrained(folder, dtype=torch.float32))


def test_a_tied_projection_may_be_stored_as_well(make, tmp_path):
    theirs, folder = make("llama", {**LLAMA, "tie_word_embeddings": True})
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_logits(imported(folder, tmp_path / "run")[0], theirs)


# --------------------------------------------------------------------------------------------------
# An imported model is a run


def test_an_imported_model_generates(folder, tmp_path, capsys):
    out = tmp_path / "run"
    ours, tokenizer = imported(folder, out)
    assert f"uv run python -m llm_basics.generate {out}" in capsys.readouterr().out
    options = commands.GenerateConfig(str(out), prompt="the", max_new_tokens=8, temperature=0.0, fast="off")
    assert samples.main(options) == 0
    ids = small_models.greedy(ours.eval(), torch.tensor(tokenizer.encode("the")), 8)
    assert capsys.readouterr().out == "the" + tokenizer.decode(ids) + "\n"


def test_an_imported_model_can_be_trained(folder, tmp_path):
    ours, _ = imported(folder, tmp_path / "run")
    options = config.TrainConfig(lr=0.01, warmup_steps=0, device="cpu")
    optimizer = trainer.make_optimizer(ours, options)
    batch = (torch.arange(20)[None], torch.arange(1, 21)[None])
    losses = [
        trainer.train_step(ours.train(), optimizer, [batch], step, options).train_loss.item()
        for step in range(1, 9)
    ]
    assert losses[-1] < losses[0] - 1


def test_the_card_of_an_imported_model_names_its_source(folder, tmp_path):
    imported(folder, tmp_path / "run")
    hf_export.main(commands.ExportConfig(str(tmp_path / "run"), out=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| imported from | theirs |" in card and "trained on" not in card and str(tmp_path) not in card


def test_the_run_has_the_name_of_the_folder_unless_another_is_given(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hf_import.main(commands.ImportConfig("theirs")) == 0
    assert run_dir.read_config("runs/theirs")["tokenizer"] == "runs/theirs/tokenizer"
    assert [path.name for path in Path("runs").iterdir()] == ["theirs"]


# --------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_of_gpt2s_two_files(folder, tmp_path):
    vocabulary.write_gpt2(small_models.tokenizer().to_vocabulary(), folder)
    (folder / "special_tokens.json").unlink()
    (folder / "tokenizer.json").unlink()
    _, tokenizer = imported(folder, tmp_path / "run")
    assert tokenizer.fingerprint() == small_models.tokenizer().fingerprint()


def test_another_tokenizer_can_be_named(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    _, tokenizer = imported(folder, tmp_path / "run", tokenizer=str(tmp_path / "elsewhere.json"))
    assert tokenizer.fingerprint() == small_models.tokenizer().fingerprint()


def test_a_folder_without_tokenizer_is_refused(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert "must hold tokenizer.json, or vocab.json and merges.txt" in refused(folder, capsys)


def test_a_tokenizer_of_another_size_is_refused(folder, capsys):
    larger = small_models.tokenizer(("<|endoftext|>", "<|more|>"))
    tokenizer_formats.write_tokenizer_json(larger.to_vocabulary(), folder / "tokenizer.json")
    assert "the vocabulary size of the model, 263, got 264" in refused(folder, capsys)
    assert "the vocabulary size of the model, 263, got 257" in refused(folder, capsys, tokenizer="bytes")


def test_a_tokenizer_that_cannot_end_a_document_is_refused(folder, capsys):
    other = small_models.tokenizer(("</s>",))
    tokenizer_formats.write_tokenizer_json(other.to_vocabulary(), folder / "tokenizer.json")
    assert "must have the special token <|endoftext|>" in refused(folder, capsys)


# --------------------------------------------------------------------------------------------------
# Unsupported models and broken folders


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "bert"}, "model_type must be gpt2, llama, "),
        ({"model_type": ...}, "got None"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window must be None, got 16"),
        ({"model_type": "mistral"}, "sliding_window must be None, got 4096"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"model_type": "arcee", "hidden_act": "xielu"}, "hidden_act must be gelu_new, "),
        ({"head_dim": 16}, "head_dim must be hidden_size / num_attention_heads = 8, got 16"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type must be default"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "rope_type must be default"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type must be default"),
        ({"rope_parameters": ["yarn"]}, "rope_type must be default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"hidden_size": ...}, "must have hidden_size, which is missing"),
        ({"hidden_size": "32"}, "model.d_model must be int, got '32'"),
        ({"hidden_size": 30}, "model.d_model must be divisible by model.n_heads"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**9}, "must hold 1000000000 blocks (config.json), got 21 tensors"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not in the model"),
        ({"intermediate_size": 41}, "mlp.down_proj.weight must be (32, 41), got (32, 40)"),
        ({"vocab_size": 264}, "model.embed_tokens.weight must be (264, 32), got (263, 32)"),
        ({"tie_word_embeddings": True}, "lm_head.weight must equal model.embed_tokens.weight"),
        ({"model_type": "qwen3"}, "model.layers.0.self_attn.k_norm.weight is missing"),
    ],
)
def test_an_unsupported_model_is_refused(options, message, folder, capsys):
    change(folder, **options)
    error = refused(folder, capsys)
    assert message in error and str(folder) in error


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is not in the model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), "must be (32,), got (33,)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "model.norm.weight must be float32, bfloat16 or float16, got torch.int8",
        ),
        (lambda t: t.clear(), "must hold 2 blocks (config.json), got 0 tensors"),
    ],
)
def test_tensors_that_do_not_match_config_json_are_refused(spoil, message, folder, capsys):
    change_tensors(folder, spoil)
    assert message in refused(folder, capsys)


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "config.json").unlink(), "config.json must describe a model"),
        (lambda f: (f / "config.json").write_text("{"), "config.json must describe a model"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json must describe a model; got list"),
        (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors, got none"),
        (lambda f: torn(f / "model.safetensors"), "must be a complete safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "must be a complete safetensors file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "must be a byte-level BPE tokenizer"),
        (lambda f: index(f, {"lm_head.weight": "../other.safetensors"}), "in the same folder"),
        (lambda f: index(f, {"lm_head.weight": "pickled.bin"}), "must be a .safetensors file"),
        (lambda f: index(f, {"lm_head.weight": "gone.safetensors"}), "gone.safetensors"),
        (lambda f: index(f, ["lm_head.weight"]), "must map each tensor to a file"),
        (shutil.rmtree, "the model to import must be a folder"),
    ],
)
def test_a_broken_folder_is_refused(spoil, message, folder, capsys):
    spoil(folder)
    assert message in refused(folder, capsys)


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Canary:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_unread(folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    torch.save(Canary(tmp_path / "executed"), folder / "pytorch_model.bin")
    message = refused(folder, capsys)
    assert "pytorch_model.bin, a pickle, which can execute code" in message and "save_pretrained" in message
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "executed")))
    assert (tmp_path / "executed").exists(), "the canary does not work"
