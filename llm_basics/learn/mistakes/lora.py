"""LoRA: the adapted layer, applying it to a model, merging, and the adapters alone."""

import copy
import math

import torch
from torch import nn

from llm_basics import swap
from llm_basics.alignment import lora
from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.learn import probes

step = probes.Step("lora")
RIGHT = {name: swap.reference(f"lora.{name}") for name in swap.PIECES["lora"].split()}
LoRALinear = RIGHT["LoRALinear"]
TARGETS = ["q_proj", "v_proj"]
RANK, ALPHA = 2, 6.0


class Block(nn.Module):
    """Projections, one of whose names ends like another."""

    def __init__(self):
        super().__init__()
        self.norm = layers.RMSNorm(6)
        self.q_proj = layers.Linear(6, 6, bias=True)
        self.v_proj = layers.Linear(6, 4)
        self.vq_proj = layers.Linear(4, 6)

    def forward(self, x):
        hidden = self.norm(x)
        return x + self.vq_proj(torch.tanh(self.v_proj(hidden + torch.tanh(self.q_proj(hidden)))))


class Net(nn.Module):
    """An embedding, two blocks and an output projection, with fixed weights."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = layers.Linear(6, 7)
        fill(self)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fill(module, seed=5):
    """Random weights, adapters included."""
    draw = probes.numbers(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * draw(*parameter.shape))
    return module


def tokens():
    return torch.arange(20).reshape(4, 5) % 7


def linear(d_in=5, d_out=4, dtype=torch.float32):
    return fill(layers.Linear(d_in, d_out, bias=True, dtype=dtype))


def adapted(a, alpha=ALPHA, rank=RANK, dropout=0.0):
    return fill(a.get_lora_linear(linear(), rank, alpha, dropout))


def model(a):
    """A model with adapters that are not zero."""
    net = Net()
    a.run_apply_lora(net, TARGETS, RANK, ALPHA)
    return fill(net)


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def trained(module):
    return sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)


# --------------------------------------------------------------------------------------------------
# Probes


def gradients(a, rank, alpha):
    layer, x = adapted(a, alpha, rank), probes.numbers(1)(3, 5).requires_grad_()
    output = layer(x)
    (output * probes.numbers(2)(*output.shape)).sum().backward()
    seen = {"output": output.detach(), "gradient of x": x.grad}
    return seen | {f"gradient of {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}


def at_the_start(a):
    layer, x = a.get_lora_linear(linear(64, 48), 16, 8.0), probes.numbers(1)(3, 64)
    output = layer(x)
    output.square().sum().backward()
    return {
        "change of the output": output.detach() - linear(64, 48)(x).detach(),
        "b": layer.b.detach().clone(),
        "a is within 1 / sqrt(d_in)": bool(layer.a.detach().abs().max() * math.sqrt(64) <= 1.0001),
        "a has the variance 1 / (3 d_in), within 20%": bool(0.8 < layer.a.detach().var() * 3 * 64 < 1.2),
        "b has a gradient": layer.b.grad is not None and bool(layer.b.grad.abs().sum() > 0),
        "trained": trained(layer),
    }


def dtypes(a):
    layer = a.get_lora_linear(linear(dtype=torch.bfloat16), RANK, ALPHA)
    found = {"a": layer.a, "b": layer.b, "output": layer(torch.ones(2, 5, dtype=torch.bfloat16))}
    return {name: str(tensor.dtype) for name, tensor in found.items()}


def dropout(a):
    layer, x = adapted(a, dropout=0.5), probes.numbers(1)(1, 5).expand(4000, 5)
    with torch.no_grad():
        low_rank = layer(x) - layer.base(x)
        layer.eval()
        seen = {"in evaluation": layer(x[:2]), "it varies in training": bool(low_rank.var(0).sum() > 0.01)}
        # the part without dropout is the mean over all that may be dropped
        exact = layer(x[:1]) - layer.base(x[:1])
        seen["the mean in training, within 10%"] = bool(
            (low_rank.mean(0) - exact[0]).norm() < 0.1 * exact.norm()
        )
        layer.train()
        layer.b.zero_()
        seen["change by dropout if b is 0"] = layer(x[:2]) - layer.base(x[:2])
    return seen


def applied(a):
    net, plain = Net(), Net()
    names = a.run_apply_lora(net, TARGETS, RANK, ALPHA)
    kept = {n.replace(".base.", "."): t for n, t in net.state_dict().items() if n[-2:] not in (".a", ".b")}
    return {
        "names": list(names),
        "trained": trained(net),
        "number of weights, trained and all": list(a.run_trainable_parameters(net)),
        "change of the output": (net(tokens()) - plain(tokens())).detach(),
        "weights of the base": copied(kept),
    }


def one_step(a):
    """The names of the weights that change in a step on all parameters."""
    net = model(a)
    before = copied(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(tokens()).square().mean().backward()
    optimizer.step()
    after = net.state_dict()
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def unknown_target(a):
    try:
        a.run_apply_lora(Net(), ["q_proj", "k_proj"], RANK, ALPHA)
    except ValueError:
        return "ValueError"
    return "no error"


def base_weights(net):
    return {n: t.detach().clone() for n, t in net.named_parameters() if n.endswith("proj.base.weight")}


def merging(a):
    net = model(a)
    seen = {"output": net(tokens()).detach(), "base weights": base_weights(net)}
    a.run_merge_lora(net)
    seen |= {"output, merged": net(tokens()).detach(), "base weights, merged": base_weights(net)}
    seen["trained, merged"] = trained(net)
    a.run_merge_lora(net)
    return seen | {"output, merged twice": net(tokens()).detach()}


def unmerging(a):
    net = model(a)
    before = base_weights(net)
    a.run_merge_lora(net)
    a.run_unmerge_lora(net)
    seen = {"change of the base weights": {n: t - before[n] for n, t in base_weights(net).items()}}
    seen["output, unmerged"] = net(tokens()).detach()
    a.run_unmerge_lora(net)
    seen["output, unmerged twice"] = net(tokens()).detach()
    net(tokens()).square().mean().backward()
    first = net.blocks[0].q_proj
    return seen | {"gradient of b": first.b.grad if first.b.grad is not None else "none"}


def saving(a):
    net, other = model(a), Net()
    state = copied(a.run_lora_state(net))
    a.run_apply_lora(other, TARGETS, RANK, ALPHA)
    a.run_load_lora_state(other, state)
    with torch.no_grad():
        for name, parameter in Net().named_parameters():  # the base of both
            for each in (net, other):
                place = name if name in dict(each.named_parameters()) else name.replace("proj.", "proj.base.")
                each.get_parameter(place).copy_(parameter)
    return {
        "state": state,
        "output of another model with it": other(tokens()).detach(),
        "output": net(tokens()).detach(),
    }


def wrong_rank(a):
    net, other = model(a), Net()
    a.run_apply_lora(other, TARGETS, RANK + 1, ALPHA)
    try:
        a.run_load_lora_state(net, copied(a.run_lora_state(other)))
    except ValueError:
        return "ValueError"
    return "no error"


class _Right:
    """The reference by the names of the adapters."""

    get_lora_linear = staticmethod(LoRALinear)
    run_apply_lora = staticmethod(RIGHT["apply_lora"])
    run_merge_lora = staticmethod(RIGHT["merge_lora"])
    run_unmerge_lora = staticmethod(RIGHT["unmerge_lora"])
    run_lora_state = staticmethod(RIGHT["lora_state"])
    run_load_lora_state = staticmethod(RIGHT["load_lora_state"])
    run_trainable_parameters = staticmethod(RIGHT["trainable_parameters"])


def expect(about, function, *more, **tolerances):
    """A probe whose expected value is that of the reference, which tests/test_lora.py checks by hand."""
    with swap.reference_only():
        right = function(_Right, *more)
    step.value(about, lambda a: function(a, *more), right, **tolerances)


expect("output and gradients of rank 2 and alpha 6", gradients, 2, 6.0)
expect("output and gradients of rank 3 and alpha 3", gradients, 3, 3.0)
expect("a layer before its first step", at_the_start)
expect("dtypes of a layer in bfloat16", dtypes)
expect("dropout on the input of the adapter", dropout)
expect("LoRA applied to a model", applied)
expect("weights that change in a step", one_step)
expect("a target that no layer has", unknown_target)
expect("merging, once and twice", merging)
expect("unmerging, once and twice", unmerging, atol=1e-6)
expect("adapters saved alone, and loaded into another model", saving)
expect("adapters of another rank", wrong_rank)


# --------------------------------------------------------------------------------------------------
# Mistakes of the layer


def mistake(piece, source="written for this catalogue", **more):
    return step.mistake(f"lora.{piece}", source=source, **more)


@mistake("LoRALinear", source="mlx-vlm#841")
class AlphaInsteadOfAlphaOverR(LoRALinear):
    """The scale is alpha, without the division by the rank. The updates grow with the rank, and a learning
    rate that suits one rank diverges at another. The scale is alpha / r."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scale = alpha


@mistake("LoRALinear", source="adapter-hub/adapters#760")
class AlphaIgnored(LoRALinear):
    """The scale is 1, whatever alpha is. Adapters of other programs, trained with another scale, then give
    other outputs. Multiply the product by alpha / r."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scale = 1.0


@mistake("LoRALinear", source="rsLoRA (arXiv 2312.03732), taken for LoRA")
class DividedByTheRootOfTheRank(LoRALinear):
    """The scale is alpha / sqrt(r), that of rank-stabilized LoRA. It is an option of its own, which the file
    of an adapter must name. LoRA divides by r."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scale = alpha / math.sqrt(rank)


@mistake("LoRALinear")
class RankOverAlpha(LoRALinear):
    """The scale is r / alpha, upside down. With alpha above r the adapter then learns slower than with none.
    The scale is alpha / r."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scale = rank / alpha


@mistake("LoRALinear")
class ScaleAppliedTwice(LoRALinear):
    """Both products are multiplied by the scale, so that the adapter has its square. Multiply one of them, or
    the result, by alpha / r."""

    def forward(self, x):
        if self.merged:
            return self.base(x)
        low = self.scale * F.linear(self.dropout(x), self.a)
        return self.base(x) + self.scale * F.linear(low, self.b)


@mistake("LoRALinear", source="public implementations")
class BNotZeroAtTheStart(LoRALinear):
    """B is initialized at random like A, so that training starts from a damaged model: the output of a new
    layer differs from that of its base. Initialize B to zeros."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        nn.init.uniform_(self.b, -1 / math.sqrt(rank), 1 / math.sqrt(rank))


@mistake("LoRALinear")
class BothZeroAtTheStart(LoRALinear):
    """A and B are both zero, and then so are the gradients of both: B's has A as a factor, A's has B. Nothing
    is ever learned. Only B starts at zero."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        nn.init.zeros_(self.a)


@mistake("LoRALinear")
class AZeroInsteadOfB(LoRALinear):
    """A is zero and B random. The start is right, but the first gradient is then A's, and PEFT's files and
    learning rates assume the other way. Initialize B to zeros and A at random."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        nn.init.zeros_(self.a)
        nn.init.uniform_(self.b, -1 / math.sqrt(rank), 1 / math.sqrt(rank))


@mistake("LoRALinear")
class AFromANormalOfVarianceOne(LoRALinear):
    """A is normal with variance 1, whatever the width, so that its product with the input grows with d_in.
    The first steps are then too large. Scale it by 1 / sqrt(d_in)."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        nn.init.normal_(self.a)


@mistake("LoRALinear", source="public implementations")
class BaseLayerNotFrozen(LoRALinear):
    """The weights of the base still require gradients, so that the optimizer holds two means for each, and
    they are trained beside the adapter, whose file then lacks half of the result. Freeze them."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        base.requires_grad_(True)


@mistake("LoRALinear", source="the default of PEFT, autocast_adapter_dtype, without its casts")
class AdapterInAnotherDtype(LoRALinear):
    """A and B are float32, whatever the dtype of the base. In a half-precision model the product fails or the
    output is float32. Create them in the dtype of the base weight."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.a, self.b = nn.Parameter(self.a.float()), nn.Parameter(self.b.float())

    def forward(self, x):
        if self.merged:
            return self.base(x)
        low = F.linear(self.dropout(x).to(self.a.dtype), self.a)
        return self.base(x) + self.scale * F.linear(low, self.b)


@mistake("LoRALinear")
class DropoutOnTheBaseAsWell(LoRALinear):
    """Dropout is applied to the input of the whole layer. The pretrained part is then noisy too, which it was
    not in pretraining. Drop only what the adapter reads."""

    def forward(self, x):
        x = self.dropout(x)
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


@mistake("LoRALinear", source="of the kind of unsloth-zoo PR #832")
class DropoutInEvaluation(LoRALinear):
    """Dropout is also applied in evaluation, so that the same input has another output each time, and samples
    and log-probabilities do not belong together. Apply it only if `training`."""

    def forward(self, x):
        if self.merged:
            return self.base(x)
        low = F.linear(F.dropout(x, self.dropout.p) if self.dropout.p else x, self.a)
        return self.base(x) + self.scale * F.linear(low, self.b)


@mistake("LoRALinear")
class DropoutNeverApplied(LoRALinear):
    """The dropout is stored and not used. Nothing fails, and an adapter of a small data set overfits as if it
    were 0. Apply it to the input of A in training."""

    def forward(self, x):
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


@mistake("LoRALinear")
class BaseLeftOut(LoRALinear):
    """The output is that of the adapter alone, without the pretrained layer. A new layer returns zeros. Add
    the product to the output of the base."""

    def forward(self, x):
        return self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)


@mistake("LoRALinear")
class ActivationBetweenAAndB(LoRALinear):
    """There is a nonlinear function between A and B, as in a bottleneck adapter (arXiv 1902.00751). Such a
    part cannot be merged into a matrix. LoRA's product is linear."""

    def forward(self, x):
        if self.merged:
            return self.base(x)
        low = F.silu(F.linear(self.dropout(x), self.a))
        return self.base(x) + self.scale * F.linear(low, self.b)


@mistake("LoRALinear")
class AddedAlsoWhenMerged(LoRALinear):
    """The product is added in the forward pass although it is part of the base weight already, so that a
    merged layer has it twice. Return the output of the base alone if `merged`."""

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)


@mistake("LoRALinear")
class AdapterDetached(LoRALinear):
    """The adapter's weights are used detached, so that no gradient reaches A and B: the loss does not move,
    and no error is raised. Use the parameters themselves."""

    def forward(self, x):
        if self.merged:
            return self.base(x)
        low = F.linear(self.dropout(x), self.a.detach())
        return self.base(x) + self.scale * F.linear(low, self.b.detach())


# --------------------------------------------------------------------------------------------------
# Mistakes of applying it


def put(model, names, rank, alpha, dropout):
    """LoRALinear in place of the layers `names`."""
    for name in names:
        parent, _, last = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, lora.LoRALinear(base, rank, alpha, dropout))
    return names


def with_last_name(model, targets):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]


def checked(model, targets):
    """The names, or the reference's error."""
    if not set(targets) <= {name.rpartition(".")[2] for name in with_last_name(model, targets)}:
        raise ValueError("an unknown target")
    return with_last_name(model, targets)


@mistake("apply_lora", source="public implementations")
def base_weights_not_frozen(model, targets, rank, alpha, dropout=0.0):
    """Only the adapted layers are frozen: embeddings, norms and all other layers are trained in full. The
    memory is hardly less, and adapters saved alone are not the model. Freeze all weights first."""
    return put(model, checked(model, targets), rank, alpha, dropout)


@mistake("apply_lora")
def adapters_frozen_too(model, targets, rank, alpha, dropout=0.0):
    """All weights are frozen after the adapters were added, so these are frozen as well and nothing is left
    to train. Freeze the model first, then add the adapters."""
    names = put(model, checked(model, targets), rank, alpha, dropout)
    model.requires_grad_(False)
    return names


@mistake("apply_lora", source="public implementations, which train the biases unasked")
def biases_trained(model, targets, rank, alpha, dropout=0.0):
    """Biases stay trainable, though they are in no adapter file: a merged or reloaded model lacks what they
    learned. Freeze all parameters, biases included."""
    names = RIGHT["apply_lora"](model, targets, rank, alpha, dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    return names


@mistake("apply_lora")
def target_matched_by_its_ending(model, targets, rank, alpha, dropout=0.0):
    """A layer is adapted if its name ends with a target, so that q_proj also means vq_proj. Compare the whole
    last part of the name."""
    checked(model, targets)
    names = [n for n, m in model.named_modules() if n.endswith(tuple(targets)) and hasattr(m, "weight")]
    model.requires_grad_(False)
    return put(model, names, rank, alpha, dropout)


@mistake("apply_lora")
def first_block_only(model, targets, rank, alpha, dropout=0.0):
    """Only the first layer of each name is adapted, such as q_proj of the first block. The search must
    continue after a target is found: every block has one."""
    names, found = checked(model, targets), {}
    for name in names:
        found.setdefault(name.rpartition(".")[2], name)
    model.requires_grad_(False)
    return put(model, list(found.values()), rank, alpha, dropout)


@mistake("apply_lora")
def unknown_target_ignored(model, targets, rank, alpha, dropout=0.0):
    """A target that no layer has is ignored. With a name of another architecture fewer layers are adapted
    than requested, or none, without an error. Raise ValueError with the names of layers."""
    model.requires_grad_(False)
    return put(model, with_last_name(model, targets), rank, alpha, dropout)


@mistake("apply_lora")
def one_adapter_for_all_layers(model, targets, rank, alpha, dropout=0.0):
    """Layers of the same name share one adapter, that of the first block. Every layer has its own A and B."""
    names = RIGHT["apply_lora"](model, targets, rank, alpha, dropout)
    first = {}
    for name in names:
        layer = model.get_submodule(name)
        owner = first.setdefault(name.rpartition(".")[2], layer)
        layer.a, layer.b = owner.a, owner.b
    return names


# --------------------------------------------------------------------------------------------------
# Mistakes of merging


def merge(model, delta, mark=True):
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            if not layer.merged:
                layer.base.weight += delta(layer)
                layer.merged = mark


@mistake("merge_lora", source="of the kind of peft PR #3111")
def merge_forgets_the_scale(model):
    """The product B A is added without alpha / r, so that the merged model differs from the trained one by
    the scale. Add scale times B A."""
    merge(model, lambda layer: layer.b @ layer.a)


@mistake("merge_lora", source="peft PR #3111")
def merge_applies_the_scale_twice(model):
    """The product is multiplied by alpha / r twice: once in the product, once when it is added. Only alpha =
    r hides it. Multiply once."""
    merge(model, lambda layer: layer.scale * layer.scale * (layer.b @ layer.a))


@mistake("merge_lora")
def merge_subtracts(model):
    """The product is subtracted from the weight. The merged model has the adapter with the wrong sign, and
    forgets where the trained one learned. Add it."""
    merge(model, lambda layer: -layer.scale * (layer.b @ layer.a))


@mistake("merge_lora")
def merged_twice(model):
    """Each call adds the product, also to a layer that is merged already. Check `merged` first."""
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.base.weight += layer.scale * (layer.b @ layer.a)
            layer.merged = True


@mistake("merge_lora")
def not_marked_as_merged(model):
    """The product is added to the weight, and the layer still adds it in its forward pass: the model has it
    twice. Set `merged`."""
    merge(model, lambda layer: layer.scale * (layer.b @ layer.a), mark=False)


@mistake("merge_lora")
def base_replaced_by_the_product(model):
    """The weight becomes the product alone, and the pretrained weight is lost. Add the product to it."""
    merge(model, lambda layer: layer.scale * (layer.b @ layer.a) - layer.base.weight)


@mistake("merge_lora")
def base_trainable_after_merging(model):
    """The merged weight is a new parameter, which requires gradients: the next optimizer trains the base. Add
    in place under no_grad, or freeze it again."""
    RIGHT["merge_lora"](model)
    for _, layer in lora.lora_layers(model):
        layer.base.weight = nn.Parameter(layer.base.weight.detach().clone())


@mistake("unmerge_lora")
def unmerge_forgets_the_scale(model):
    """The product is subtracted without alpha / r, so that the base weight is not what it was. Subtract what
    was added: scale times B A."""
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            if layer.merged:
                layer.base.weight -= layer.b @ layer.a
                layer.merged = False


@mistake("unmerge_lora")
def unmerged_without_having_been_merged(model):
    """The product is subtracted from every layer, also from one that is not merged. A second call damages the
    base. Check `merged` first."""
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.base.weight -= layer.scale * (layer.b @ layer.a)
            layer.merged = False


@mistake("unmerge_lora")
def only_marked_as_unmerged(model):
    """`merged` is reset, and the weight keeps the product, which the forward pass adds again. Subtract it."""
    for _, layer in lora.lora_layers(model):
        layer.merged = False


# --------------------------------------------------------------------------------------------------
# Mistakes of saving


@mistake("load_lora_state", source="scale lost on loading: adapters reset to alpha 1 in public programs")
def scale_lost_on_loading(model, tensors):
    """After loading the scale is 1, that of a new layer without alpha, so that a reloaded adapter is weaker
    or stronger than the one saved. Loading must leave alpha / r as it is."""
    RIGHT["load_lora_state"](model, tensors)
    for _, layer in lora.lora_layers(model):
        layer.scale = 1.0


@mistake("load_lora_state", source="torch's load_state_dict with strict=False")
def mismatches_ignored(model, tensors):
    """Tensors whose name or shape does not fit are left out without a word, as with strict=False. The adapter
    then stays at its start. Compare names and shapes, and raise ValueError."""
    own = RIGHT["lora_state"](model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


@mistake("load_lora_state")
def loaded_into_a_copy(model, tensors):
    """The tensors are written to copies of A and B, and the model keeps what it had. Copy into the parameters
    themselves, under no_grad."""
    own = {name: tensor.clone() for name, tensor in RIGHT["lora_state"](model).items()}
    RIGHT["load_lora_state"](copy.deepcopy(model), tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@mistake("lora_state")
def scale_part_of_what_is_saved(model):
    """B is saved multiplied by the scale. A program that reads the file multiplies it again. Save A and B as
    they are, and alpha beside them."""
    return {
        name: tensor * (model.get_submodule(name[:-2]).scale if name.endswith(".b") else 1)
        for name, tensor in RIGHT["lora_state"](model).items()
    }


@mistake("lora_state")
def base_saved_too(model):
    """The frozen weights are saved as well, so that each adapter is as large as the model. Save A and B of
    the adapted layers alone."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@mistake("trainable_parameters")
def frozen_weights_counted(model):
    """Frozen weights are counted as trained. The number to report is that of the weights that require
    gradients."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total


@mistake("trainable_parameters")
def matrices_counted_as_one(model):
    """Parameters are counted, not the numbers in them. Sum `numel()` over them."""
    all_of_them = list(model.parameters())
    return sum(parameter.requires_grad for parameter in all_of_them), len(all_of_them)
