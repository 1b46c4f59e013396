"""Generation: what is drawn, and how it becomes text. Alone: uv run pytest tests/test_generate.py"""

import functools

import pytest
import torch

from llm_basics.core import config, generate, model, tokenizer
from llm_basics.inference import engine

SHAPE = {"vocab_size": 23, "context_length": 9, "d_model": 24, "num_layers": 2, "num_heads": 3, "d_ff": 40}
LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 1.4, -3.0])


@pytest.fixture
def lm():
    shape = config.ModelConfig(23, 9, 24, 2, 3, d_ff=40, rope_theta=50.0)
    lm = model.TransformerLM(shape, dtype=torch.float64)
    with torch.no_grad():  # far from uniform, so that a wrong context shows in the likeliest token
        for parameter in lm.parameters():
            parameter.mul_(3)
    return lm


@pytest.fixture
def write(adapters, lm):
    """Generate with the implementation under test and the weights of `lm`."""

    def run(prompt, max_new_tokens, **options):
        return adapters.run_generate(
            **SHAPE,
            rope_theta=50.0,
            weights=lm.state_dict(),
            prompt=torch.tensor(prompt),
            max_new_tokens=max_new_tokens,
            **options,
        )

    return run


def greedy_without_cache(lm, tokens, n):
    tokens = list(tokens)
    for _ in range(n):
        window = torch.tensor(tokens[-lm.config.context_length :])
        tokens.append(lm(window)[-1].argmax().item())
    return tokens[-n:]


# --------------------------------------------------------------------------------------------------
# The distribution


def kept(probabilities):
    return probabilities.nonzero().flatten().tolist()


def test_temperature_divides_the_logits():
    found = generate.next_token_probabilities(LOGITS, temperature=0.7)
    torch.testing.assert_close(found, torch.softmax(LOGITS / 0.7, -1))


def test_temperature_zero_leaves_the_likeliest():
    assert generate.next_token_probabilities(LOGITS, temperature=0.0).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (6, list(range(6))), (99, list(range(6)))]
)
def test_top_k_keeps_k_tokens_in_their_proportions(k, expected):
    found = generate.next_token_probabilities(LOGITS, temperature=0.5, top_k=k)
    assert kept(found) == expected
    expected_probabilities = torch.softmax(LOGITS[expected] / 0.5, -1)
    torch.testing.assert_close(found[expected], expected_probabilities)


def test_top_k_among_equals_keeps_exactly_k():
    assert kept(generate.next_token_probabilities(torch.zeros(7), top_k=3)) == [0, 1, 2]


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64).log()
    for p, expected in [
        (0.1, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.72, [1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ]:
        found = generate.next_token_probabilities(logits, top_p=p)
        assert kept(found) == expected, p
        assert found.sum().item() == pytest.approx(1)
    assert found[1] / found[3] == pytest.approx(4 / 3)


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(generate.next_token_probabilities(logits, top_k=2, top_p=0.5)) == [0]


def test_distributions_of_a_batch_do_not_mix():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    found = generate.next_token_probabilities(logits, top_k=2, top_p=0.9)
    torch.testing.assert_close(found[0], found[1].flip(0))


def test_inputs_are_not_changed():
    logits = LOGITS.clone()
    generate.next_token_probabilities(logits, 0.5, 2, 0.5)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*, got"):
        generate.next_token_probabilities(LOGITS, **wrong)


# --------------------------------------------------------------------------------------------------
# Whole texts


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
@pytest.mark.parametrize("prompt", [[4], [1, 2, 3, 4, 5], list(range(9)), list(range(14))])
def test_greedy_equals_reading_everything_again_for_each_token(write, lm, prompt, settings):
    """Also past the context length: then the last 9 tokens count, and their positions begin at 0."""
    with torch.no_grad():
        expected = greedy_without_cache(lm, prompt, 12)
    assert len(set(expected)) > 2
    assert list(write(prompt, 12, **settings)) == expected


def test_seed_decides(write):
    def texts(seed):
        return list(write([1, 2], 7, temperature=1.5, generator=torch.Generator().manual_seed(seed)))

    assert texts(1) == texts(1)
    assert len({tuple(texts(seed)) for seed in range(5)}) > 1


def test_draws_follow_the_distribution(write, lm):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = generate.next_token_probabilities(lm(torch.tensor([3, 8]))[-1], 9.0, top_k=5)
    draws = torch.tensor(
        [write([3, 8], 1, temperature=9.0, top_k=5, generator=generator)[0] for _ in range(300)]
    )
    found = torch.bincount(draws, minlength=23) / 300
    assert kept(found) == kept(expected)
    assert (found - expected).abs().max() < 5 * (0.25 / 300) ** 0.5


def test_stop_token_ends_the_text_and_is_not_given_out(lm):
    with torch.no_grad():
        expected = greedy_without_cache(lm, [1, 2, 3], 12)
    stop = expected[4]
    found = list(generate.generate(lm, torch.tensor([1, 2, 3]), 12, temperature=0.0, stop_id=stop))
    assert found == expected[: expected.index(stop)]


def test_generating_leaves_the_model_in_its_mode(lm):
    lm.train()
    stream = generate.generate(lm, torch.tensor([1]), 5)
    next(stream)
    assert not lm.training
    stream.close()
    assert lm.training


def test_dropout_is_off():
    torch.manual_seed(0)
    lm = model.TransformerLM(config.ModelConfig(23, 9, 24, 2, 3, dropout=0.5)).train()
    texts = {tuple(generate.generate(lm, torch.tensor([1]), 5, temperature=0.0)) for _ in range(5)}
    assert len(texts) == 1


def test_empty_prompt_is_refused(lm):
    with pytest.raises(ValueError, match="at least one token"):
        next(generate.generate(lm, torch.tensor([], dtype=torch.long), 3))


# --------------------------------------------------------------------------------------------------
# Several texts at once

PROMPTS = [[4], [1, 2, 3], [1, 2], list(range(9)), list(range(14)), [3, 1, 4, 1, 5], [4]]


def singly_and_at_once(lm, n, *settings, prompts=PROMPTS, **options):
    def seeded(text):
        return torch.Generator().manual_seed(text)

    prompts = [torch.tensor(prompt) for prompt in prompts]
    singly = [
        list(generate.generate(lm, prompt, n, *settings, **options, generator=seeded(text)))
        for text, prompt in enumerate(prompts)
    ]
    generators = [seeded(text) for text in range(len(prompts))]
    return singly, engine.generate_batch(lm, prompts, n, *settings, **options, generators=generators)


@pytest.mark.parametrize("settings", [(0.0,), (1.0,), (1.5, 5), (1.5, None, 0.7)])
def test_texts_at_once_are_those_that_come_singly(lm, settings):
    """Beyond the context too, of 9 tokens."""
    singly, at_once = singly_and_at_once(lm, 12, *settings)
    assert at_once == singly and all(len(text) == 12 for text in singly)
    assert len({tuple(text) for text in singly}) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    "stop", [s if s % 5 == 0 else pytest.param(s, marks=pytest.mark.slow) for s in range(23)]
)
def test_texts_that_stop_leave_the_others_alone(lm, temperature, stop):
    singly, at_once = singly_and_at_once(lm, 12, temperature, stop_id=stop)
    assert at_once == singly


def test_some_texts_stop_in_the_middle(lm):
    singly, _ = singly_and_at_once(lm, 12, 1.5)
    lengths = {len(text) for text in singly_and_at_once(lm, 12, 1.5, stop_id=singly[1][5])[1]}
    assert 12 in lengths and len(lengths) > 2


@pytest.mark.parametrize(("n", "prompts"), [(0, PROMPTS), (1, PROMPTS), (5, []), (5, [[7]])])
def test_few_texts_and_short_ones(lm, n, prompts):
    singly, at_once = singly_and_at_once(lm, n, 1.0, prompts=prompts)
    assert at_once == singly and [len(text) for text in singly] == [n] * len(prompts)


def test_texts_at_once_without_dropout_and_the_model_as_it_was():
    lm = model.TransformerLM(config.ModelConfig(23, 9, 24, 2, 3, dropout=0.5)).train()
    singly, at_once = singly_and_at_once(lm, 5, 0.0)
    assert at_once == singly and lm.training


def test_an_empty_prompt_among_others_is_refused(lm):
    with pytest.raises(ValueError, match="each prompt must have at least one token"):
        engine.generate_batch(lm, [torch.tensor([1]), torch.tensor([], dtype=torch.long)], 3)


# --------------------------------------------------------------------------------------------------
# Scores changed before the draw


def test_min_p_of_one_is_greedy(lm):
    greedy = list(generate.generate(lm, torch.tensor([4, 2]), 12, 0.0))
    adjust = generate.LogitsProcessor(min_p=1.0)
    assert list(generate.generate(lm, torch.tensor([4, 2]), 12, 1.0, adjust=adjust)) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_changes_no_score_changes_no_text(lm, temperature):
    plain, _ = singly_and_at_once(lm, 12, temperature)
    for texts in singly_and_at_once(lm, 12, temperature, adjust=generate.LogitsProcessor(temperature)):
        assert texts == plain


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_changed_scores_for_texts_at_once(lm, temperature):
    adjust = generate.LogitsProcessor(temperature, min_p=0.2, repetition_penalty=1.5)
    plain, _ = singly_and_at_once(lm, 12, temperature)
    singly, at_once = singly_and_at_once(lm, 12, temperature, adjust=adjust)
    assert at_once == singly != plain


def test_the_whole_text_is_told_though_it_is_longer_than_the_context(lm):
    for prompt in [[5], list(range(14))]:
        received, again = [], []

        def record(ids, logits, to):
            assert logits.shape == (23,)
            to.append(ids.tolist())
            return logits

        record_one, record_all = (functools.partial(record, to=to) for to in (received, again))
        text = list(generate.generate(lm, torch.tensor(prompt), 12, 0.0, adjust=record_one))
        assert received == [[*prompt, *text[:n]] for n in range(12)]
        engine.generate_batch(lm, [torch.tensor(prompt)], 12, 0.0, adjust=record_all)
        assert again == received


def test_who_has_ended_leaves_the_others_alone(lm):
    singly, _ = singly_and_at_once(lm, 12, 1.5)
    received = [[] for _ in PROMPTS]

    def ends_with(i, token):
        received[i].append(token)
        return len(received[i]) == i + 1

    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    at_once = engine.generate_batch(lm, prompts, 12, 1.5, generators=generators, ends_with=ends_with)
    assert at_once == received == [text[: i + 1] for i, text in enumerate(singly)]


# --------------------------------------------------------------------------------------------------
# Text


BYTES = tokenizer.Tokenizer.byte_level()


@pytest.fixture
def writer():
    """A model of bytes, of which some are likelier than others."""
    lm = model.TransformerLM(config.ModelConfig(257, 32, 16, 1, 2))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return lm


@pytest.mark.parametrize("adjust", [None, generate.LogitsProcessor(0.9, 0.05, 1.2)])
@pytest.mark.parametrize("n_stops", [0, 3])
def test_texts_at_once_are_those_that_are_completed_singly(writer, n_stops, adjust):
    prompts = ["", "a", "a longer prompt", "caf\u00e9"]
    settings = (24, 0.9, 50, None)

    def singly(stops):
        pairs = enumerate(prompts)
        options = {"stops": stops, "adjust": adjust}
        return ["".join(engine.complete(writer, BYTES, p, *settings, i, **options)) for i, p in pairs]

    whole = singly(())
    stops = [text[10 + i : 12 + i] for i, text in enumerate(whole[:n_stops])]
    seeds = range(len(prompts))
    found = engine.complete_batch(writer, BYTES, prompts, *settings, seeds, stops=stops, adjust=adjust)
    assert found == singly(stops) and len(set(found)) == len(found)
    cut = [text[: min([text.find(s) for s in stops if s in text], default=len(text))] for text in whole]
    assert found == cut and (found != whole) == bool(n_stops)


def test_complete_ends_with_the_document():
    torch.manual_seed(0)
    lm = model.TransformerLM(config.ModelConfig(257, 16, 16, 1, 2))
    text = "".join(engine.complete(lm, tokenizer.Tokenizer.byte_level(), "", 40, seed=1))
    assert text and "<|endoftext|>" not in text
    with torch.no_grad():
        lm.ln_final.weight.zero_()  # all tokens equally likely; the lowest id, NUL, is first
    assert "".join(engine.complete(lm, tokenizer.Tokenizer.byte_level(), "x", 3, temperature=0.0)) == "\0\0\0"
