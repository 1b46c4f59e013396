"""Prompt and response as tokens with a mask, log-probabilities of the response, entropy, masked means."""

import types

import torch
from torch import nn

from llm_basics.alignment import response_log_probs
from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("response_log_probs")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(response_log_probs))
draw = probes.numbers(seed=70)

PAD, END = 31, 30


class Words:
    """A tokenizer with Hugging Face's interface: one token for each letter and space, ids from 1. Nothing
    is added at the beginning or the end, as by the tokenizers of GPT-2 and Qwen."""

    pad_token_id, eos_token_id, bos_token_id = PAD, END, None
    eos_token, pad_token, padding_side = "$", "#", "right"
    vocab_size = 32
    beginning = ()

    def encode(self, text, add_special_tokens=True, **options):
        known = {"$": END, "#": PAD, " ": 27, "\n": 28}
        ids = [known.get(c, ord(c) % 26 + 1) for c in text]
        return [*self.beginning, *ids] if add_special_tokens else ids

    def __call__(self, text, add_special_tokens=True, **options):
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens)}
        return {"input_ids": [self.encode(each, add_special_tokens) for each in text]}


class Marked(Words):
    """A tokenizer that marks the beginning of a text, as that of Llama."""

    bos_token_id, beginning = 29, (29,)


class Model(nn.Module):
    """Logits over 32 tokens from the two last ones, in an object as Hugging Face's."""

    def __init__(self, seed=71, dropout=0.0):
        super().__init__()
        start = probes.numbers(seed)
        self.table, self.before = nn.Parameter(start(32, 32)), nn.Parameter(0.5 * start(32, 32))
        self.dropout = nn.Dropout(dropout)

    @property
    def device(self):
        return self.table.device

    def logits(self, input_ids):
        previous = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], dim=1)
        return self.dropout(self.table[input_ids] + self.before[previous])

    def forward(self, input_ids, attention_mask=None, **options):
        return types.SimpleNamespace(logits=self.logits(input_ids))


class Plain(Model):
    """The same model, which returns logits, as this package's."""

    def forward(self, input_ids):
        return self.logits(input_ids)


PROMPTS = ["add one and two", "say red", "hi"]
OUTPUTS = ["three", "red it is", "hello"]


def tokenized(prompts, outputs, tokenizer=None):
    tokenizer = tokenizer or Words()
    encoded = [
        (tokenizer.encode(p, add_special_tokens=False), tokenizer.encode(o, add_special_tokens=False))
        for p, o in zip(prompts, outputs, strict=True)
    ]
    width = max(len(p) + len(o) for p, o in encoded)
    ids = torch.tensor([p + o + [PAD] * (width - len(p) - len(o)) for p, o in encoded])
    places = torch.arange(width)
    mask = torch.stack([(places >= len(p)) & (places < len(p) + len(o)) for p, o in encoded])
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def as_numbers(found):
    """The three tensors; a mask may be of bools or of numbers."""
    return {name: tensor.long() for name, tensor in found.items()}


def without_padding(found):
    """What is masked may be anything."""
    labels, mask = found["labels"], found["response_mask"].bool()
    return [row[kept].tolist() for row, kept in zip(labels, mask, strict=True)]


CONTRACT = {"contract": "tokenize_prompt_and_output"}


def compare_tokens(about, prompts, outputs, observe=as_numbers, tokenizer=Words, **ground):
    step.value(
        about,
        lambda a: observe(a.run_tokenize_prompt_and_output(list(prompts), list(outputs), tokenizer())),
        observe(tokenized(prompts, outputs, tokenizer())),
        axes="row position",
        **(ground or CONTRACT),
    )


compare_tokens("one prompt and its response", PROMPTS[:1], OUTPUTS[:1])
compare_tokens("three of different lengths", PROMPTS, OUTPUTS)
compare_tokens("a response of one token", ["ab", "abcd"], ["c", "e"])
compare_tokens("the longest response belongs to the shortest prompt", ["a", "abcdef"], ["bcdefghijk", "g"])
compare_tokens(
    "a tokenizer that marks the beginning of a text",
    PROMPTS,
    OUTPUTS,
    without_padding,
    Marked,
    beyond="a beginning between prompt and response is seen by no model in training",
)


def log_probs_of(model, input_ids, labels):
    logits = model.logits(input_ids).double()
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def entropy(logits):
    return torch.distributions.Categorical(logits=logits.double()).entropy().to(logits.dtype)


BATCH = tokenized(PROMPTS, OUTPUTS)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]


def score(a, model, entropy=False, name="log_probs"):
    return a.run_get_response_log_probs(model, IDS, LABELS, return_token_entropy=entropy)[name]


def through(observe, model_class=Model):
    """A function of the model's weights, so that their gradients are compared."""

    def run(a, table):
        model = model_class()
        del model.table
        model.table = table
        return observe(a, model)

    return run


TABLE = Model().table.detach()


def right_log_probs(table):
    model = Model()
    logits = table[IDS] + model.before.detach()[torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], 1)]
    return torch.log_softmax(logits, -1).gather(-1, LABELS[..., None])[..., 0]


def right_entropy(table):
    model = Model()
    logits = table[IDS] + model.before.detach()[torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], 1)]
    return torch.distributions.Categorical(logits=logits).entropy()


step.compare(
    "log-probabilities of the labels, and their gradient",
    through(score),
    right_log_probs,
    {"table": TABLE},
    axes="row position",
    contract="get_response_log_probs",
)
step.compare(
    "logits around 1000",
    through(lambda a, model: score(a, model)),
    right_log_probs,
    {"table": 1000 + 20 * TABLE},
    axes="row position",
    atol=1e-2,
    contract="get_response_log_probs",
)
step.compare(
    "the entropy of each prediction",
    through(lambda a, model: score(a, model, True, "token_entropy")),
    right_entropy,
    {"table": TABLE},
    axes="row position",
    contract="get_response_log_probs",
)
step.value(
    "entropy only if it is wanted",
    lambda a: sorted(a.run_get_response_log_probs(Model(), IDS, LABELS, return_token_entropy=False)),
    ["log_probs"],
    contract="get_response_log_probs",
)
step.compare(
    "a model that returns logits",
    through(score, Plain),
    right_log_probs,
    {"table": TABLE},
    axes="row position",
    beyond="the assignment has Hugging Face's models alone; this package's return logits",
)
step.value(
    "a model with dropout, in evaluation",
    lambda a: [score(a, model := Model(dropout=0.5).eval()).detach(), model.training],
    [log_probs_of(Model(), IDS, LABELS).detach().float(), False],
    beyond="the rollout was sampled without dropout: with it, the log-probabilities are of another policy",
)

# --------------------------------------------------------------------------------------------------
# Of the edition of 2025


def compare_entropy(about, logits, **more):
    step.compare(
        about,
        lambda a, logits: a.run_compute_entropy(logits),
        entropy,
        {"logits": logits},
        axes="row",
        contract="compute_entropy",
        **more,
    )


compare_entropy("entropy of logits", 2 * draw(4, 7))
compare_entropy("entropy of a certain prediction, logits of 1000", torch.eye(3) * 1000, gradients=False)

NUMBERS, MASK = draw(3, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0]])


def compare_masked(about, dim, divisor=None):
    """The masked mean, or with a divisor the masked sum."""

    def ours(a, tensor):
        if divisor is None:
            return a.run_masked_mean(tensor, MASK, dim)
        return a.run_masked_normalize(tensor, MASK, dim, normalize_constant=divisor)

    def reference(tensor):
        kept, counts = torch.where(MASK.bool(), tensor, 0.0), MASK
        total, n = (kept.sum(), counts.sum()) if dim is None else (kept.sum(dim), counts.sum(dim))
        return total / (n if divisor is None else divisor)

    key = "masked_mean" if divisor is None else "masked_normalize"
    step.compare(about, ours, reference, {"tensor": NUMBERS}, axes="row", contract=key)


compare_masked("masked mean of each row", 1)
compare_masked("masked mean of everything", None)
compare_masked("masked sum of each row over 4", 1, 4.0)
compare_masked("masked sum of everything over 2", None, 2.0)
step.value(
    "infinite where it is masked",
    lambda a: a.run_masked_normalize(NUMBERS.masked_fill(MASK == 0, float("inf")), MASK, 1),
    (NUMBERS * MASK).sum(1),
    beyond="a log-probability of -inf in the padding must not reach the loss: 0 times infinity is NaN",
)
step.value(
    "a row that is masked wholly",
    lambda a: a.run_masked_mean(NUMBERS, MASK * torch.tensor([[1], [0], [1]]), 1),
    (NUMBERS * MASK).sum(1) / MASK.sum(1) * torch.tensor([1, 0, 1]),
    beyond="an empty response would make the loss of the whole batch NaN",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


def mistake(piece, source="written for this catalogue", **more):
    return step.mistake(f"response_log_probs.{piece}", source=source, **more)


def build(prompt_strs, output_strs, tokenizer, border=lambda prompt, output: len(prompt), pad="right"):
    """The tensors with another border of the mask, or another side of the padding."""
    parts = [
        (right.encode(tokenizer, p), right.encode(tokenizer, o))
        for p, o in zip(prompt_strs, output_strs, strict=True)
    ]
    width = max(len(p) + len(o) for p, o in parts)
    tokens, mask = [], []
    for p, o in parts:
        ids, empty = p + o, width - len(p) - len(o)
        marks = [i >= border(p, o) for i in range(len(ids))]
        left = pad == "left"
        tokens.append(
            [tokenizer.pad_token_id] * empty * left + ids + [tokenizer.pad_token_id] * empty * (not left)
        )
        mask.append([False] * empty * left + marks + [False] * empty * (not left))
    return torch.tensor(tokens), torch.tensor(mask)


def shifted(tokens, mask):
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": mask[:, 1:]}


@mistake("tokenize_prompt_and_output", source="the usual first version")
def mask_not_shifted(prompt_strs, output_strs, tokenizer):
    """The mask is aligned with the inputs, not with the labels. It then begins one prediction too late: the
    first token of the response, which decides most, is never trained. Cut the first column, as of
    labels."""
    tokens, mask = build(prompt_strs, output_strs, tokenizer)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": mask[:, :-1]}


@mistake("tokenize_prompt_and_output")
def mask_begins_a_token_early(prompt_strs, output_strs, tokenizer):
    """The last token of the prompt is in the mask. It was given, not chosen by the model, and a reward must
    not move its probability. The first label that counts is the first token of the response."""
    return shifted(*build(prompt_strs, output_strs, tokenizer, lambda p, o: len(p) - 1))


@mistake("tokenize_prompt_and_output")
def prompt_in_the_mask(prompt_strs, output_strs, tokenizer):
    """The mask covers prompt and response. The loss then trains the model to write prompts, and long
    prompts outweigh the answers. Mark the tokens of the response alone."""
    return shifted(*build(prompt_strs, output_strs, tokenizer, lambda p, o: 0))


@mistake("tokenize_prompt_and_output")
def padding_in_the_mask(prompt_strs, output_strs, tokenizer):
    """The mask extends to the end of the row and covers the padding. The model is trained to write padding,
    and a short response counts as a long one. End the mask with the response."""
    found = right.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)
    return {**found, "response_mask": found["response_mask"].cummax(1).values}


@mistake("tokenize_prompt_and_output")
def last_token_not_in_the_mask(prompt_strs, output_strs, tokenizer):
    """The last token of the response is not in the mask. It is mostly the end of the text: untrained, the
    model never learns to stop. The mask has as many ones as the response has tokens."""
    found = right.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)
    mask = found["response_mask"]
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return {**found, "response_mask": mask & following}


@mistake("tokenize_prompt_and_output", source="generation pads so, and the code is shared")
def padded_on_the_left(prompt_strs, output_strs, tokenizer):
    """The padding is at the start, as for generation. Without an attention mask the model attends to it, and
    positions are shifted, so the log-probabilities are not those of the rollout. Pad at the end."""
    return shifted(*build(prompt_strs, output_strs, tokenizer, pad="left"))


@mistake("tokenize_prompt_and_output")
def labels_not_shifted(prompt_strs, output_strs, tokenizer):
    """The labels are the inputs: each token is to be predicted from itself. The log-probabilities are then
    of the wrong tokens. Labels are the sequence without its first token."""
    found = right.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)
    return {**found, "labels": found["input_ids"]}


@mistake("tokenize_prompt_and_output")
def nothing_cut(prompt_strs, output_strs, tokenizer):
    """Inputs and labels have the full length, and the labels are rolled by one. The last label is then the
    first token of the prompt. Cut the last column of the inputs and the first of the labels."""
    tokens, mask = build(prompt_strs, output_strs, tokenizer)
    return {"input_ids": tokens, "labels": tokens.roll(-1, 1), "response_mask": mask.roll(-1, 1)}


@mistake("tokenize_prompt_and_output")
def a_space_between(prompt_strs, output_strs, tokenizer):
    """Prompt and response are joined with a space. The response in training then is not what was sampled,
    so its log-probability is another one. Join the ids of both as they are."""
    return right.tokenize_prompt_and_output(prompt_strs, [f" {text}" for text in output_strs], tokenizer)


@mistake("tokenize_prompt_and_output", source="public issues of tokenizers that prepend BOS")
def beginning_before_the_response(prompt_strs, output_strs, tokenizer):
    """The tokenizer adds its beginning-of-text token to the response too, so it is in the middle. The
    model never saw it there. Encode both parts with add_special_tokens=False."""

    class Adding:
        pad_token_id = tokenizer.pad_token_id

        @staticmethod
        def encode(text, add_special_tokens=False):
            return tokenizer.encode(text)

    return right.tokenize_prompt_and_output(prompt_strs, output_strs, Adding)


@mistake("tokenize_prompt_and_output")
def cut_to_the_shortest(prompt_strs, output_strs, tokenizer):
    """All rows are cut to the length of the shortest, instead of padded. The ends of the longer responses
    are lost without an error. Pad to the longest."""
    found = right.tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)
    sizes = [
        len(right.encode(tokenizer, p) + right.encode(tokenizer, o))
        for p, o in zip(prompt_strs, output_strs, strict=True)
    ]
    return {name: tensor[:, : min(sizes) - 1] for name, tensor in found.items()}


def scored(model, input_ids, labels, wanted, pick, entropy=right.compute_entropy):
    output = model(input_ids)
    logits = getattr(output, "logits", output)
    return {"log_probs": pick(logits, labels)} | ({"token_entropy": entropy(logits)} if wanted else {})


def gather(log_probs, labels):
    return log_probs.gather(-1, labels[..., None]).squeeze(-1)


@mistake("get_response_log_probs", source="trl issues on shifted log-probabilities")
def log_probs_shifted_by_one(model, input_ids, labels, return_token_entropy=False):
    """The logits are cut once more, though inputs and labels are already a token apart: each label is
    scored by the prediction before it. Gather the labels from the logits of the same column."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: gather(F.log_softmax(logits.roll(1, 1)), labels),
    )


@mistake("get_response_log_probs")
def log_probs_of_the_inputs(model, input_ids, labels, return_token_entropy=False):
    """The log-probabilities of the input tokens are gathered, not of the labels. These are tokens that the
    model has as input. Gather with labels."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, _: gather(F.log_softmax(logits), input_ids),
    )


@mistake("get_response_log_probs")
def logits_instead_of_log_probs(model, input_ids, labels, return_token_entropy=False):
    """The logits of the labels are returned, which are not normalized: a constant added to all would change
    them. Subtract the log-sum-exp over the vocabulary."""
    return scored(model, input_ids, labels, return_token_entropy, gather)


@mistake("get_response_log_probs")
def probabilities(model, input_ids, labels, return_token_entropy=False):
    """Probabilities are returned, without the logarithm. A response of many tokens is then a sum of
    probabilities, not of logarithms. Use log_softmax."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: gather(F.softmax(logits), labels),
    )


@mistake("get_response_log_probs")
def logarithm_of_softmax(model, input_ids, labels, return_token_entropy=False):
    """The logarithm is taken of softmax. A probability that is rounded to 0 gives -inf, and the ratio of
    two policies NaN. Use log_softmax, which never makes the small number."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: gather(F.softmax(logits).log(), labels),
    )


@mistake("get_response_log_probs")
def softmax_over_the_positions(model, input_ids, labels, return_token_entropy=False):
    """Softmax runs over the sequence, not over the vocabulary, so later tokens change the probability of
    earlier ones. Normalize the last axis."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: gather(F.log_softmax(logits, 1), labels),
    )


@mistake("get_response_log_probs")
def negative_log_likelihood(model, input_ids, labels, return_token_entropy=False):
    """The sign is that of a loss: cross-entropy instead of log-probability. The policy gradient then lowers
    the probability of what was rewarded. Log-probabilities are at most 0."""
    return scored(
        model,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: -gather(F.log_softmax(logits), labels),
    )


@mistake("get_response_log_probs", source="public reviews of solutions of the assignment")
def computed_without_gradients(model, input_ids, labels, return_token_entropy=False):
    """The log-probabilities are computed under no_grad, as those of the rollout. The numbers are right, but
    the loss has no gradient and nothing is learned. no_grad is for the old and the reference model."""
    with torch.no_grad():
        return right.get_response_log_probs(model, input_ids, labels, return_token_entropy)


@mistake("get_response_log_probs", source="unsloth-zoo PR 832")
def dropout_switched_on(model, input_ids, labels, return_token_entropy=False):
    """The model is put into training mode, which turns dropout on. The rollout was sampled without, so the
    ratio to the old policy is noise before the first step. Leave the mode to the caller."""
    model.train()
    return right.get_response_log_probs(model, input_ids, labels, return_token_entropy)


@mistake("get_response_log_probs")
def only_models_of_hugging_face(model, input_ids, labels, return_token_entropy=False):
    """The result of the model is taken to be an object with logits. This package's models return the logits
    themselves. Accept both."""
    return scored(
        lambda ids: model(ids).logits,
        input_ids,
        labels,
        return_token_entropy,
        lambda logits, labels: gather(F.log_softmax(logits), labels),
    )


@mistake("get_response_log_probs")
def entropy_always_returned(model, input_ids, labels, return_token_entropy=False):
    """The entropy is computed although it was not wanted, which needs memory for one more tensor of batch x
    seq x vocabulary. Compute it only if return_token_entropy."""
    return right.get_response_log_probs(model, input_ids, labels, True)


@mistake("compute_entropy")
def entropy_with_the_wrong_sign(logits):
    """The minus is missing: this is the sum of p log p, which is negative. A bonus for entropy then makes
    the policy certain. Entropy is at least 0."""
    return -right.compute_entropy(logits)


@mistake("compute_entropy")
def entropy_in_bits(logits):
    """The logarithm is to base 2. Losses here are in nats, so a coefficient of the entropy means something
    else. Use the natural logarithm."""
    return right.compute_entropy(logits) / torch.tensor(2.0).log()


@mistake("compute_entropy")
def mean_over_the_vocabulary(logits):
    """p log p is averaged over the vocabulary. The probabilities are weights already: the mean divides by
    the size of the vocabulary once more. Sum over the last axis."""
    return right.compute_entropy(logits) / logits.shape[-1]


@mistake("compute_entropy")
def entropy_of_zero_probabilities_is_nan(logits):
    """p log p is computed from softmax and its logarithm. Where p is rounded to 0 this is 0 times -inf,
    NaN, and a certain model has no entropy at all. Take log p from log_softmax."""
    p = F.softmax(logits)
    return -(p * p.log()).sum(-1)


@mistake("compute_entropy")
def entropy_of_logits(logits):
    """The logits take the place of log-probabilities: -sum p x. That changes when a constant is added to
    all logits. Normalize them first."""
    return -(F.softmax(logits) * logits).sum(-1)


@mistake("masked_mean")
def mean_over_the_padding_too(tensor, mask, dim=None):
    """The sum over the mask is divided by the number of all elements. Short responses then count less,
    since their zeros are averaged in. Divide by the sum of the mask."""
    kept = tensor.masked_fill(mask == 0, 0.0)
    return kept.mean() if dim is None else kept.mean(dim)


@mistake("masked_mean")
def mask_ignored(tensor, mask, dim=None):
    """The mask is not used: prompt and padding are averaged in. Multiply by it, or fill what is masked with
    0, and divide by its sum."""
    return tensor.mean() if dim is None else tensor.mean(dim)


@mistake("masked_mean")
def empty_response_is_nan(tensor, mask, dim=None):
    """Where the mask is empty, 0 is divided by 0. One empty response makes the loss NaN, and so all
    weights. Divide by at least 1."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return right.masked_normalize(tensor, mask, dim) / count


@mistake("masked_mean")
def mean_of_the_means(tensor, mask, dim=None):
    """Without dim the mean of the rows' means is taken, so that a token of a short row counts more. Without
    dim, all elements count alike: one sum, one number of elements."""
    return right.masked_mean(tensor, mask, -1).mean() if dim is None else right.masked_mean(tensor, mask, dim)


@mistake("masked_normalize")
def constant_ignored(tensor, mask, dim=None, normalize_constant=1.0):
    """The sum is not divided by the constant, and the size of the gradient grows with the batch. Divide by
    normalize_constant."""
    return right.masked_normalize(tensor, mask, dim)


@mistake("masked_normalize")
def mean_instead_of_sum(tensor, mask, dim=None, normalize_constant=1.0):
    """The masked mean is divided by the constant, so the length of a response is divided out after all. Dr.
    GRPO divides the sum."""
    counts = mask.sum() if dim is None else mask.sum(dim)
    return right.masked_normalize(tensor, mask, dim) / counts / normalize_constant


@mistake("masked_normalize")
def masked_by_multiplication(tensor, mask, dim=None, normalize_constant=1.0):
    """The mask is multiplied in. Where a masked element is infinite, 0 times infinity is NaN, and the loss
    is NaN. Replace what is masked by 0 with masked_fill or where."""
    kept = tensor * mask
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


@mistake("masked_normalize")
def sums_of_what_is_masked(tensor, mask, dim=None, normalize_constant=1.0):
    """The mask is upside down: what it marks is left out, and the rest is summed. The prompt is trained and
    the response is not. 1 marks what counts."""
    return right.masked_normalize(tensor, mask == 0, dim, normalize_constant)
