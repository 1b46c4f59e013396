"""fast/generate.py against the reference. Alone: `uv run pytest tests/test_fast_generate.py`."""

import contextlib
import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.core import config, generate, layers, model
from llm_basics.fast import generate as fast
from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import autotuner, decode, threads, vectors, weights
from llm_basics.fast.cuda import cuda_graph
from llm_basics.inference import engine

# every option differs from its default in some shape; some numbers of rows are not divisible by four
SHAPES = {
    "llama": {},
    "gpt2": {"norm": "layer", "position": "learned", "ffn": "gelu_tanh", "bias": True},
    "tied": {"tie_embeddings": True, "position": "learned", "ffn": "gelu_tanh"},
    "first transformer": {"norm": "layer", "norm_placement": "post", "ffn": "relu2", "bias": True},
    "rms after": {"norm_placement": "post"},
    "layer norm without bias": {"norm": "layer", "ffn": "silu"},
    "gelu": {"ffn": "gelu", "bias": True},
    "relu2": {"ffn": "relu2", "n_layers": 1},
    "qk norm": {"qk_norm": True},
    "qk norm, biases, two groups": {"qk_norm": True, "bias": True, "ffn": "silu", "n_kv_heads": 2},
    "two groups": {"n_kv_heads": 2},
    "one group": {"n_kv_heads": 1, "ffn": "gelu"},
    "no positions": {"position": "none"},
    "odd sizes": {"position": "learned", "d_model": 21, "n_heads": 3, "d_ff": 35, "vocab_size": 59},
    "odd sizes and biases": {"d_model": 18, "n_heads": 3, "d_ff": 35, "bias": True, "ffn": "silu"},
    "one head, wide": {"n_heads": 1, "d_ff": 151},
    "large eps": {"norm_eps": 0.3, "qk_norm": True},
    "large eps, layer": {"norm_eps": 0.3, "norm": "layer"},
    "theta": {"rope_theta": 7.0},
    "padded vocabulary": {"vocab_multiple": 16, "zero_init": True},
    "all switches": {
        **{"vocab_multiple": 64, "qk_norm": True, "norm_placement": "post", "tie_embeddings": True},
    },
    "default sizes": {"d_model": 64, "d_ff": None, "n_layers": 4, "init": "gpt2", "dropout": 0.1},
}
TOLERANCE = 1e-4
PRINT_ONCE = fast.print_once


def make(context_length=64, **options):
    shape = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 40, **options}
    lm = model.TransformerLM(config.ModelConfig(context_length=context_length, **shape))
    with torch.no_grad():  # norms and biases too, and far from uniform
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lm.eval()


# covered by others in all but a combination
SLOW = ["tied", "rms after", "layer norm without bias", "gelu", "two groups", "odd sizes", "one head, wide"]
SLOW += [
    "large eps, layer",
    "theta",
    "padded vocabulary",
    "large eps",
    "one group",
    "no positions",
    "qk norm",
]
SLOW += ["first transformer"]


@pytest.fixture(
    params=[
        pytest.param(shape, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, shape in SHAPES.items()
    ]
)
def lm(request):
    return make(**request.param)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def both(lm, prompt, n, *settings, **options):
    """The tokens of reference and fast implementation, with the same seed."""
    prompt = torch.tensor(prompt)
    return [
        list(home.generate(lm, prompt, n, *settings, generator=seeded(), **options))
        for home in (generate, fast)
    ]


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Lines logged once. A test fails on a fallback to the reference, unless it pops that line."""
    lines = []
    monkeypatch.setattr(fast, "print_once", lambda line: None if line in lines else lines.append(line))
    yield lines
    assert not [line for line in lines if "by the reference" in line]


# --------------------------------------------------------------------------------------------------
# The same numbers


def logits_by(reader, text, n_prompt):
    with torch.no_grad():
        found = [reader.read_prompt(torch.tensor(text[:n_prompt])).clone()]
        found += [reader.read_token(text[i], i).clone() for i in range(n_prompt, len(text))]
    return torch.stack(found)


@pytest.mark.parametrize("n_prompt", [1, 40, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", [fast.CPUDecoder, cuda_graph.StaticStep])
def test_scores_of_each_token(lm, reader, n_prompt):
    text = torch.randint(lm.config.vocab_size, (64,)).tolist()
    found = logits_by(reader(lm), text, n_prompt)
    with torch.no_grad():
        expected = lm(torch.tensor(text))[n_prompt - 1 :]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_scores_that_would_overflow():
    lm = make()
    with torch.no_grad():
        for block in lm.layers:
            block.attn.q_proj.weight.mul_(30)
    text = torch.randint(61, (64,)).tolist()
    with torch.no_grad():
        expected = lm(torch.tensor(text))
    torch.testing.assert_close(logits_by(fast.CPUDecoder(lm), text, 1), expected, rtol=0, atol=1e-2)


def test_weights_are_no_copies():
    lm = make()
    reader = fast.CPUDecoder(lm)
    logits_by(reader, [1, 2, 3], 1)
    with torch.no_grad():
        # weights that no cached key or value depends on
        lm.layers[1].ffn.w2.weight.zero_()
        lm.layers[1].attn.q_proj.weight.mul_(2)
        lm.lm_head.weight.mul_(2)
        expected = lm(torch.tensor([1, 2, 3]))[2]
    torch.testing.assert_close(reader.read_token(3, 2), expected, rtol=0, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Several threads


@pytest.fixture
def n_threads():
    """Set the number of threads during a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def only(size, has_drafts=False):
    """An autotuner with one config."""
    return autotuner.Autotuner([autotuner.DecodingConfig(size, has_drafts)])


@pytest.mark.parametrize("size", [2, 3])
def test_a_team_gives_the_same_bits(lm, n_threads, size):
    text = torch.randint(lm.config.vocab_size, (20,)).tolist()
    alone = logits_by(fast.CPUDecoder(lm), text, 4)
    n_threads(size)
    reader = fast.CPUDecoder(lm)
    members = max(way.n_threads for way in reader.reading.seconds)
    assert members == (1 if lm.config.d_head % 4 else min(size, reader.shape.n_kv_heads))
    reader.reading = only(members)
    assert torch.equal(logits_by(reader, text, 4), alone)
    assert reader.team.meeting[0] % members == 0 and (reader.team.meeting[0] > 0) == (members > 1)


def read_on(reader, token, position, n):
    text = [token]
    while len(text) <= n:
        text += reader.greedy_tokens(text[-1], position + len(text) - 1, n + 1 - len(text))
    return text[1:]


def test_a_team_writes_the_same_text(n_threads):
    lm = make(n_kv_heads=2)
    alone = fast.CPUDecoder(lm)
    alone.read_prompt(torch.tensor([5, 6]))
    n_threads(2)
    reader = fast.CPUDecoder(lm)
    alone.writing, reader.writing = only(1, True), only(2, True)
    reader.read_prompt(torch.tensor([5, 6]))
    assert read_on(reader, 7, 2, 40) == read_on(alone, 7, 2, 40)


def test_a_team_whose_size_changes_writes_the_same_text(n_threads):
    lm = make(n_kv_heads=2)
    expected = both(lm, [5, 6], 60, 0.0)[0]
    n_threads(2)
    reader = fast.CPUDecoder(lm)
    text = [5, 6, expected[0]]
    reader.read_prompt(torch.tensor(text[:2]))
    for size in itertools.islice(itertools.cycle([1, 2]), 10):
        reader.writing = only(size, True)
        # all members share the state of the drafts
        text += reader.greedy_tokens(text[-1], len(text) - 1, 5)
    assert text[2:] == expected[:51]


def test_a_team_whose_first_member_is_interrupted_does_not_wait_for_it():
    team, arrived = fast.ThreadTeam(), []

    def work(number, member):
        if number == 0:
            raise KeyboardInterrupt
        threads.barrier(member.meeting, member.size)
        arrived.append(number)
        return 1

    with pytest.raises(KeyboardInterrupt):
        team.run(2, work)
    threads.helpers(fast.MAX_THREADS - 1).submit(lambda: None).result(timeout=30)
    deadline = time.monotonic() + 30
    while not arrived and time.monotonic() < deadline:
        time.sleep(0.01)
    assert arrived == [1]


def test_errors_of_other_members_are_raised():
    def work(number, member):
        if number == 1:
            raise ZeroDivisionError
        return 1

    with pytest.raises(ZeroDivisionError):
        fast.ThreadTeam().run(2, work)


@pytest.mark.parametrize("n_rows", [1, 4, 16, 17, 33, 61, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_each_row_belongs_to_one_member(n_rows, size):
    parts = [range(*decode.rows_of(n_rows, number, size)) for number in range(size)]
    assert [row for part in parts for row in part] == list(range(n_rows))
    assert all(len(part) >= min(n_rows, vectors.ROWS) for part in parts if len(part))


@pytest.mark.parametrize("fastest", [autotuner.DecodingConfig(2, True), autotuner.DecodingConfig(1, False)])
def test_the_autotuner_keeps_the_fastest(fastest):
    ways = [autotuner.DecodingConfig(size, has_drafts) for size in (2, 1) for has_drafts in (True, False)]
    pace, tried = autotuner.Autotuner(ways), []
    for _ in range(200):
        way = pace.next_config()
        tried.append(way)
        pace.record(way, 1.0 if way == fastest else 3.0)
    # first all configs, then periodic retrials of the others
    assert tried[:4] == ways
    others = [(call, way) for call, way in enumerate(tried[4:], 5) if way != fastest]
    assert [call for call, _ in others] == [8, 16, 32, 64, 96, 128, 160, 192]
    assert len({way for _, way in others[:3]}) == 3


def test_one_slow_call_is_forgiven_and_a_busy_core_is_not():
    pace = autotuner.Autotuner([autotuner.DecodingConfig(2), autotuner.DecodingConfig(1)])
    pace.record(autotuner.DecodingConfig(2), 1.0), pace.record(autotuner.DecodingConfig(1), 1.6)
    pace.record(autotuner.DecodingConfig(2), 2.5)
    assert pace.next_config() == autotuner.DecodingConfig(2)
    pace.record(autotuner.DecodingConfig(2), 20.0)
    assert pace.next_config() == autotuner.DecodingConfig(1)


def test_timings_are_kept_for_the_next_process(tmp_path):
    path, (slow, quick) = tmp_path / "decoding.json", [autotuner.DecodingConfig(n) for n in (2, 1)]
    tuner = autotuner.Autotuner([slow, quick], path)
    tuner.record(slow, 3.0)
    tuner.save()
    assert not path.exists()  # one config is not measured yet
    tuner.record(quick, 1.0)
    tuner.save()
    again = autotuner.Autotuner([slow, quick], path)
    assert again.seconds == {slow: 3.0, quick: 1.0} and again.next_config() == quick


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "null", "5"])
def test_damaged_timings_are_measured_again(tmp_path, content):
    path, config_ = tmp_path / "decoding.json", autotuner.DecodingConfig(1)
    path.write_text(content)
    tuner = autotuner.Autotuner([config_], path)
    assert tuner.seconds == {config_: 0.0}
    tuner.record(config_, 2.0)
    tuner.path = tmp_path / "missing" / "decoding.json"
    tuner.saved = None
    tuner.save()  # a folder that cannot be written is no error


# --------------------------------------------------------------------------------------------------
# The same text


@pytest.mark.parametrize("has_drafts", [True, False])
def test_the_likeliest_text(lm, has_drafts, monkeypatch):
    monkeypatch.setattr(autotuner, "for_model", lambda *_: only(1, has_drafts))
    expected, found = both(lm, [5, 6, 7], 60, 0.0)
    assert found == expected and len(found) == 60
    assert len(set(expected)) > 3


@pytest.mark.parametrize("settings", [(1.0,), (0.7, 5), (1.3, None, 0.8), (0.9, 20, 0.9)])
def test_drawn_text(settings):
    expected, found = both(make(), [5, 6, 7], 60, *settings)
    assert found == expected and len(set(expected)) > 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("adjust", [{"repetition_penalty": 1.3}, {"min_p": 0.1}, {"min_p": 1.0}, {}])
def test_text_of_changed_scores(temperature, adjust):
    lm = make(40)
    adjustment = generate.LogitsProcessor(temperature, **adjust)
    plain = list(generate.generate(lm, torch.tensor([5, 6, 7]), 60, temperature, generator=seeded()))
    expected, found = both(lm, [5, 6, 7], 60, temperature, adjust=adjustment)
    assert found == expected and len(set(expected)) > 3
    is_changed = "repetition_penalty" in adjust or (adjust and temperature > 0)
    assert (expected != plain) == bool(is_changed)


@pytest.mark.parametrize("settings", [(1.0,), (0.7, 5), (0.0,), (0.9, 20, 0.9), (0.9, None, 0.9)])
def test_the_same_text_with_all_fast_implementations(settings):
    lm = make(40)
    texts = [list(generate.generate(lm, torch.tensor([5, 6, 7]), 60, *settings, generator=seeded()))]
    with swap.using("fast", lambda line: None):
        assert generate.next_token_probabilities is fast.next_token_probabilities
        texts.append(list(generate.generate(lm, torch.tensor([5, 6, 7]), 60, *settings, generator=seeded())))
        prompts = [torch.tensor([5, 6, 7])] * 2
        texts += engine.generate_batch(lm, prompts, 60, *settings, generators=[seeded(), seeded()])
    assert texts == texts[:1] * 4


@pytest.mark.parametrize("is_small", [True, False])
def test_a_greedy_batch_of_a_small_model_is_decoded_one_by_one(is_small, monkeypatch):
    lm, prompts = make(), [torch.tensor(prompt) for prompt in ([5, 6, 7], [1], [9] * 20)]
    if not is_small:
        monkeypatch.setattr(fast, "MAX_WEIGHTS_READ", 3 * lm.config.n_matmul_params - 1)
    stop = engine.generate_batch(lm, prompts, 12, temperature=0.0)[1][7]
    results, prompts_read = [], []
    decoder = fast.CPUDecoder
    monkeypatch.setattr(fast, "CPUDecoder", lambda lm: prompts_read.append(lm) or decoder(lm))
    for what in ("reference", "fast"):
        calls: dict[int, list[int]] = {0: [], 1: [], 2: []}

        def ends_with(i, token, calls=calls):
            calls[i].append(token)
            return i == 2 and len(calls[i]) == 4

        with swap.using("fast", lambda line: None) if what == "fast" else contextlib.nullcontext():
            new = engine.generate_batch(lm, prompts, 12, 0.0, stop_id=stop, ends_with=ends_with)
        results.append((new, calls))
    assert results[0] == results[1]
    assert stop not in results[0][0][1] and len(results[0][0][2]) == 4
    assert len(prompts_read) == (3 if is_small else 0)


@pytest.mark.parametrize("n_prompt", [1, 8, 9, 10, 25])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_past_the_context(temperature, n_prompt):
    expected, found = both(make(9), list(range(n_prompt)), 60, temperature)
    assert found == expected and len(found) == 60


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_stop_token_ends_the_text_and_is_not_given_out(temperature):
    lm = make()
    stop = both(lm, [1], 20, temperature)[0][11]
    expected, found = both(lm, [1], 20, temperature, stop_id=stop)
    assert found == expected and stop not in found and len(found) < 12


@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_texts(n):
    expected, found = both(make(), [4, 2], n)
    assert found == expected and len(found) == n


def test_training_between_texts_counts():
    lm, texts = make(), set()
    for _ in range(3):
        expected, found = both(lm, [1, 2], 40, 0.0)
        assert found == expected
        texts.add(tuple(found))
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert len(texts) == 3


def test_the_model_is_left_in_its_mode_and_without_dropout():
    lm = make(dropout=0.5).train()
    stream = fast.generate(lm, torch.tensor([1]), 5, 0.0)
    next(stream)
    assert not lm.training
    stream.close()
    assert lm.training
    assert len({tuple(fast.generate(lm, torch.tensor([1]), 9, 0.0)) for _ in range(3)}) == 1


def test_two_texts_at_once_do_not_mix():
    lm = make()
    expected = [both(lm, [start], 12, 0.0)[0] for start in (1, 2)]
    streams = [fast.generate(lm, torch.tensor([start]), 12, 0.0) for start in (1, 2)]
    assert [list(pair) for pair in zip(*zip(*streams, strict=True), strict=True)] == expected


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"temperature": 0.0, "top_p": 2.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must be .*, got"):
        list(fast.generate(make(), torch.tensor([1]), 3, **wrong))


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        list(fast.generate(make(), torch.tensor([], dtype=torch.long), 3))


# --------------------------------------------------------------------------------------------------
# Drafts


def drafts_of(monkeypatch):
    """Record the number of tokens to draft next, after each kernel call."""
    monkeypatch.setattr(autotuner, "MAX_TOKENS_PER_CALL", 1)
    monkeypatch.setattr(autotuner, "for_model", lambda *_: only(1, True))
    counts, write = [], decode.write_likeliest
    monkeypatch.setattr(
        decode, "write_likeliest", lambda *args: [write(*args), counts.append(int(args[-2][0]))][0]
    )
    return counts


def test_a_text_whose_drafts_are_right(monkeypatch):
    lm = make(256, d_model=64, vocab_size=250)
    expected = both(lm, [5, 6, 7], 200, 0.0)[0]
    counts = drafts_of(monkeypatch)
    assert list(fast.generate(lm, torch.tensor([5, 6, 7]), 200, 0.0)) == expected
    assert np.mean(counts) > 0.6 * decode.MOST_DRAFTED and len(set(expected)) > 3


@pytest.fixture
def wrong_drafts(monkeypatch):
    """Draft with the matrices of another model."""

    def of_another_model(w):
        rounded, kept = weights_rounded(w)
        for numbers in kept[::2]:
            numbers[:] = np.random.default_rng(0).integers(-127, 128, numbers.shape)
        return rounded, kept

    weights_rounded = weights.rounded
    monkeypatch.setattr(weights, "rounded", of_another_model)
    monkeypatch.setattr(autotuner, "for_model", lambda *_: only(1, True))


def test_a_text_whose_drafts_are_wrong(lm, wrong_drafts):
    expected, found = both(lm, [5, 6, 7], 60, 0.0)
    assert found == expected


def test_what_is_wrong_is_drafted_seldom(wrong_drafts, monkeypatch):
    counts = drafts_of(monkeypatch)
    expected, found = both(make(256, d_model=64, vocab_size=250), [5, 6, 7], 200, 0.0)
    assert found == expected and np.mean(counts) < 3 and min(counts) < 0


def test_several_tokens_in_one_pass(lm):
    text, reader, room = torch.randint(lm.config.vocab_size, (40,)), fast.CPUDecoder(lm), []
    alone = decode.Member(0, 1, np.zeros(2, np.int64))
    for start, end in [(0, 16), (16, 17), (17, 19), (19, 26), (26, 40)]:
        given = reader.shape, reader.weights, reader.states[0], alone
        decode.read_tokens(text[start:end].numpy(), start, True, *given)
        room.append(torch.from_numpy(reader.states[0].logits[: end - start]).clone())
    with torch.no_grad():
        expected = lm(text)
    torch.testing.assert_close(lm.postprocess_logits(torch.cat(room)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000])
def test_products_of_whole_numbers(n):
    random = np.random.default_rng(n)
    rows, x = random.integers(-127, 128, (4, 1024)), random.integers(-900, 901, 1024)
    rows[:, n:] = x[n:] = 0
    rows, x = rows.astype(np.int8), x.astype(np.int16)

    @numba_jit.jit
    def sums(rows, x):
        return numba_jit.four_sums(rows.ctypes.data, rows.shape[1], x.ctypes.data)

    assert list(sums(rows, x)) == (rows.astype(int) @ x.astype(int)).tolist()


@pytest.mark.parametrize("d_in", [1, 21, 128, 4096])
@pytest.mark.parametrize("d_out", [1, 4, 7, 64])
@pytest.mark.parametrize("kind", ["random", "all equal", "zero", "one is large"])
def test_a_rounded_product_is_near(d_in, d_out, kind):
    matrix, x = torch.randn(d_out, d_in), torch.randn(1, d_in)
    if kind == "all equal":
        # the largest possible integer sums
        matrix.fill_(3.0), x.fill_(-2.0)
    elif kind == "zero":
        matrix[0], x = 0.0, x * 0
    elif kind == "one is large":
        x[0, 0] = matrix[0, 0] = 1e4
    bias, out = torch.randn(d_out), np.zeros((1, d_out), np.float32)
    numbers = np.zeros((-(-d_out // 4) * 4, vectors.padded(d_in)), np.int8)
    scales = np.zeros(d_out, np.float32)
    vectors.round_rows(matrix.data_ptr(), d_in, numbers, scales)
    # off by half a step each
    assert np.abs(numbers[:d_out, :d_in] * scales[:, None] - matrix.numpy()).max() <= 0.501 * scales.max()
    given = np.array([numbers.ctypes.data, scales.ctypes.data])
    vectors.multiply(given, x.numpy(), 1, bias.numpy(), out, 0, d_out)
    expected = (x @ matrix.T + bias).numpy()
    error = np.linalg.norm(x) * np.linalg.norm(matrix, axis=1).max() * 0.03
    assert np.abs(out - expected).max() <= error + 1e-6


# --------------------------------------------------------------------------------------------------
# The distribution

CUTS = [
    (1.0, None, None),
    *[(temperature, k, p) for temperature in (0.0, 0.3, 1.7) for k in (1, 2, 7, 40, 99) for p in (None, 0.6)],
]


@pytest.mark.parametrize("cuts", CUTS)
def test_probabilities_are_the_reference_s_to_the_last_bit(cuts):
    for logits in [*(3 * torch.randn(20, 40)), 3 * torch.randn(2, 5, 40), torch.randn(3, 40).bfloat16()]:
        expected = generate.next_token_probabilities(logits, *cuts)
        assert torch.equal(fast.next_token_probabilities(logits, *cuts), expected)
        # many ties, at the cutoff and elsewhere
        rounded = logits.round()
        expected = generate.next_token_probabilities(rounded, *cuts)
        assert torch.equal(fast.next_token_probabilities(rounded, *cuts), expected)


def test_probabilities_need_no_sort_of_the_whole_vocabulary(monkeypatch):
    def refuse(*_):
        raise AssertionError("sorted")

    monkeypatch.setattr(fast, "probabilities_by_sorting", refuse)
    logits = torch.randn(4000)
    for cuts in [(0.8, 5), (0.8, 5, 0.9), (0.0,)]:
        assert fast.next_token_probabilities(logits, *cuts).count_nonzero() <= 5


@pytest.mark.parametrize("wrong", [(-1.0,), (1.0, 0), (1.0, 5, 2.0), (float("nan"), 3)])
def test_probabilities_of_impossible_settings(wrong):
    def outcome(home):
        try:
            return home.next_token_probabilities(torch.randn(40), *wrong).isnan().any().item()
        except ValueError as error:
            return str(error)

    assert outcome(fast) == outcome(generate)


# --------------------------------------------------------------------------------------------------
# Argmax


def test_of_equals_the_lowest_id():
    # MKL gives the last of 61 equal rows a different last bit
    lm = make(position="learned", vocab_size=64)
    with torch.no_grad():
        lm.lm_head.weight[:] = lm.lm_head.weight[0]
    assert both(lm, [1, 2], 5, 0.0) == [[0] * 5] * 2


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-8, 3e-8, 6e-8, 1e-7, 1e-6, 9e-6])
def test_near_equals_are_left_to_the_reference(gap):
    logits = np.array([-1.0, 0.25 - gap, 0.25, -2.0], np.float32)
    assert vectors.likeliest(logits) == -1
    assert vectors.likeliest(logits[::-1].copy()) == -1


@pytest.mark.parametrize("kind", vectors.FFN)
def test_activations_over_the_whole_range(kind):
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.tensor([-1e4, 1e4])]).double()
    expected = {
        "swiglu": lambda x: tF.silu(x) * 3,
        "gelu": tF.gelu,
        "gelu_tanh": lambda x: tF.gelu(x, approximate="tanh"),
        "relu2": lambda x: tF.relu(x).square(),
        "silu": tF.silu,
    }[kind](x)
    hidden = x.float().numpy().copy()
    vectors.activate(vectors.FFN[kind], hidden, np.full_like(hidden, 3))
    # large values, where torch loses the same float32 digits
    torch.testing.assert_close(torch.from_numpy(hidden).double(), expected, rtol=2e-6, atol=1e-6)


def test_a_unique_maximum_is_found_at_any_position():
    for token in range(61):
        assert vectors.likeliest((np.arange(61) == token).astype(np.float32)) == token


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_likeliest_is_the_reference_s(scale):
    for logits in scale * torch.randn(50, 40):
        expected = int(generate.next_token_probabilities(logits, 0.0).argmax())
        assert vectors.likeliest(logits.numpy()) in (expected, -1)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_is_broken_fails_as_with_the_reference(number):
    assert vectors.likeliest(np.array([1, number, 2], np.float32)) == -1
    lm = make()
    stream = fast.generate(lm, torch.tensor([1]), 5, 0.0)
    next(stream)
    with torch.no_grad():
        lm.lm_head.weight.fill_(number)
    with pytest.raises(FloatingPointError, match="probabilities must be finite"):
        next(stream)


# --------------------------------------------------------------------------------------------------
# Fallbacks


@dataclasses.dataclass(frozen=True)
class Newer(config.ModelConfig):
    soft_cap: float | None = None
    kind: str = ""


class Own(layers.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def own_norm(lm):
    lm.layers[1].ln2 = Own(32)


def subclass(lm):
    lm.__class__ = type("Larger", (model.TransformerLM,), {"__module__": "larger"})


def option(name, value):
    def change(lm):
        lm.config = Newer(**{**dataclasses.asdict(lm.config), name: value})

    return change


def in_columns(lm):
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.T.contiguous().T)


def new_parameter(lm):
    lm.layers[0].attn.gate = nn.Parameter(torch.ones(1))


def own_forward(lm):
    lm.ln_final.forward = lambda x: 3 * x


UNREADABLE = {
    "ln2 is a Own of test_fast_generate": own_norm,
    "the model is a Larger of larger": subclass,
    "the model's soft_cap is 30.0": option("soft_cap", 30.0),
    "the model's kind is new": option("kind", "new"),
    "layers.0.attn.gate": new_parameter,
    "token_embeddings.weight is float64 on cpu": lambda lm: lm.double(),
    "token_embeddings.weight is bfloat16 on cpu": lambda lm: lm.bfloat16(),
    "lm_head.weight is not contiguous": in_columns,
    "layers.0.ffn has hooks": lambda lm: lm.layers[0].ffn.register_forward_hook(lambda *_: None),
    "ln_final has hooks or an instance attribute": own_forward,
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_unsupported_models_use_the_reference_and_log_why(reason, said):
    lm = make()
    assert weights.supports(lm) == ""
    UNREADABLE[reason](lm)
    expected, found = both(lm, [1, 2], 20)
    assert found == expected
    assert reason in said.pop()


def test_an_unknown_option_may_be_unset():
    lm = make()
    option("soft_cap", None)(lm)
    assert weights.supports(lm) == ""


def test_autocast_uses_the_reference(said):
    with torch.autocast("cpu", torch.bfloat16):
        list(fast.generate(make(), torch.tensor([1]), 3))
    assert said.pop() == "text is generated by the reference, since autocast is enabled"


def test_lines_are_logged_once(capsys):
    for _ in range(2):
        PRINT_ONCE("a line of this test")
    assert capsys.readouterr().err == "a line of this test\n"


# --------------------------------------------------------------------------------------------------
# swap


@pytest.fixture
def mine(tmp_path):
    def write(source):
        path = tmp_path / "mine.py"
        path.write_text("import torch\nfrom torch import nn\n" + source)
        return path

    with swap.restored():
        yield write


@pytest.mark.parametrize("piece", ["softmax", "next_token_probabilities"])
def test_user_code_for_sampling_replaces_the_fast_implementation(mine, piece):
    def own(name):
        parameters = "x, dim=-1" if name == "softmax" else "logits, temperature=1.0, top_k=None, top_p=None"
        return f"def {name}({parameters}):\n    return torch.zeros(61).index_fill(0, torch.tensor(7), 1.0)\n"

    lines = []
    swap.use(mine(own(piece)))
    with swap.using("fast", lines.append):
        assert generate.generate.__module__ == "llm_basics.core.generate"
    home = "functional" if piece == "softmax" else "generate"
    assert f"generate: reference code is used, a fast kernel would bypass your {home}.{piece}" in lines


@pytest.mark.parametrize(
    "source, reason",
    [
        ("def rms_norm(x, weight, eps=1e-5):\n    return x * weight\n", "rms_norm is of mine.py"),
        (
            "class RMSNorm(nn.Module):\n"
            "    def __init__(self, d_model, eps=1e-5, device=None, dtype=None):\n"
            "        super().__init__()\n"
            "        self.weight = nn.Parameter(torch.ones(d_model))\n"
            "    def forward(self, x):\n        return x * self.weight\n",
            "ln1 is a RMSNorm of mine.py",
        ),
    ],
)
def test_user_code_for_the_model_is_used(mine, said, source, reason):
    swap.use(mine(source))
    with swap.using("fast", lambda line: None):
        lm = make()
        found = list(generate.generate(lm, torch.tensor([1]), 20, 0.0))
        assert reason in said.pop()
        assert found == list(swap.reference("generate.generate")(lm, torch.tensor([1]), 20, 0.0))


def test_the_fast_implementation_replaces_the_reference():
    with swap.using("fast", lambda line: None):
        assert generate.generate is fast.generate
    assert generate.generate is not fast.generate


@pytest.mark.gpu
def test_a_graph_writes_the_same_text():
    for name, options in SHAPES.items():
        lm = make(**options).cuda()
        prompt = torch.tensor([1, 2, 3], device="cuda")
        expected = list(generate.generate(lm, prompt, 80, 0.0))
        assert list(fast.generate(lm, prompt, 80, 0.0)) == expected, name
