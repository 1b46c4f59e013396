"""Tensor parallelism of one MLP: columns, rows, and the two together, on two ranks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.learn import probes, ranks
from llm_basics.learn.mistakes import ring_all_reduce

step = probes.Step("tensor_parallel")
WORLD, D_IN, D_OUT = 2, 4, 6
draw = probes.numbers(seed=70)
# weights and inputs, the same on every rank
COLUMN = {"weight": draw(D_OUT, D_IN), "bias": draw(D_OUT)}
ROW = {"weight": draw(D_IN, D_OUT), "bias": draw(D_IN)}
FFN = {"w1": draw(D_OUT, D_IN), "w2": draw(D_IN, D_OUT), "w3": draw(D_OUT, D_IN)}
UNEVEN = {"w1": draw(5, D_IN), "w2": draw(D_IN, 5), "w3": draw(5, D_IN)}
X, HIDDEN = draw(2, 3, D_IN), draw(2, 3, D_OUT)
OUT_GRADIENT, HIDDEN_GRADIENT = draw(2, 3, D_IN), draw(2, 3, D_OUT)


def part(tensor, rank, dim=0):
    return tensor.tensor_split(WORLD, dim)[rank]


def linear_of(weights):
    layer = nn.Linear(*reversed(weights["weight"].shape))
    layer.load_state_dict(weights)
    return layer


def ffn_of(weights):
    d_ff, d_model = weights["w1"].shape
    ffn = layers.SwiGLU(d_model, d_ff)
    ffn.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return ffn


def observed(module, x, gradient):
    """Output, gradients, and what a rank exchanges in forward and in backward."""
    x = x.clone().requires_grad_()
    with ring_all_reduce.traffic() as forward:
        output = module(x)
    with ring_all_reduce.traffic() as backward:
        output.backward(gradient)
    counts = [sorted(f"{name} of {n}" for name, n, _ in seen) for seen in (forward, backward)]
    named = module.named_parameters()
    return {
        "output": output.detach(),
        "gradient of the input": x.grad,
        "exchanged in forward": counts[0],
        "exchanged in backward": counts[1],
        "weights": {name: parameter.detach() for name, parameter in module.named_parameters()},
        "gradients of the weights": {name: parameter.grad for name, parameter in named},
    }


def all_reduce_of(tensor):
    return [f"all_reduce of {tensor.numel()}"]


def column(a):
    module = a.get_column_parallel_linear(linear_of(COLUMN))
    return observed(module, X, part(HIDDEN_GRADIENT, dist.get_rank(), -1))


def expected_column(rank):
    weight, bias, x = (t.clone().requires_grad_() for t in (COLUMN["weight"], COLUMN["bias"], X))
    output = tF.linear(x, weight, bias)
    output.backward(HIDDEN_GRADIENT)
    return {
        "output": part(output.detach(), rank, -1),
        "gradient of the input": x.grad,
        "exchanged in forward": [],
        "exchanged in backward": all_reduce_of(X),
        "weights": {"weight": part(COLUMN["weight"], rank), "bias": part(COLUMN["bias"], rank)},
        "gradients of the weights": {"weight": part(weight.grad, rank), "bias": part(bias.grad, rank)},
    }


def row(a):
    module = a.get_row_parallel_linear(linear_of(ROW))
    return observed(module, part(HIDDEN, dist.get_rank(), -1), OUT_GRADIENT)


def expected_row(rank):
    weight, bias, x = (t.clone().requires_grad_() for t in (ROW["weight"], ROW["bias"], HIDDEN))
    output = tF.linear(x, weight, bias)
    output.backward(OUT_GRADIENT)
    return {
        "output": output.detach(),
        "gradient of the input": part(x.grad, rank, -1),
        "exchanged in forward": all_reduce_of(X),
        "exchanged in backward": [],
        "weights": {"weight": part(ROW["weight"], rank, 1), "bias": ROW["bias"]},
        "gradients of the weights": {"weight": part(weight.grad, rank, 1), "bias": bias.grad},
    }


def swiglu(weights):
    def on_rank(a):
        return observed(a.get_tensor_parallel_swiglu(ffn_of(weights)), X, OUT_GRADIENT)

    def expected(rank):
        w1, w2, w3, x = (t.clone().requires_grad_() for t in (*map(weights.get, ("w1", "w2", "w3")), X))
        output = tF.linear(tF.silu(tF.linear(x, w1)) * tF.linear(x, w3), w2)
        output.backward(OUT_GRADIENT)
        dims = {"w1": 0, "w2": 1, "w3": 0}
        gradients = {"w1": w1.grad, "w2": w2.grad, "w3": w3.grad}
        return {
            "output": output.detach(),
            "gradient of the input": x.grad,
            "exchanged in forward": all_reduce_of(X),
            "exchanged in backward": 2 * all_reduce_of(X),
            "weights": {f"{k}.weight": part(weights[k], rank, dims[k]) for k in dims},
            "gradients of the weights": {f"{k}.weight": part(gradients[k], rank, dims[k]) for k in dims},
        }

    return on_rank, expected


ranks.probe(step, "a column-parallel layer", column, expected_column, "get_column_parallel_linear")
ranks.probe(step, "a row-parallel layer", row, expected_row, "get_row_parallel_linear")
ranks.probe(step, "the whole network", *swiglu(FFN), "get_tensor_parallel_swiglu")
ranks.probe(step, "five hidden units on two ranks", *swiglu(UNEVEN), "get_tensor_parallel_swiglu")


# --------------------------------------------------------------------------------------------------
# Mistakes


def all_reduced(x):
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x


class _Exchange(torch.autograd.Function):
    """Functions of the value in forward, and of the gradient in backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.of_gradient = backward
        return forward(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.of_gradient(gradient), None, None


def same(x):
    return x.view_as(x)


class Column(swap.reference("tensor_parallel.ColumnParallelLinear")):
    of_input, of_gradient = staticmethod(same), staticmethod(all_reduced)

    def forward(self, x):
        return F.linear(_Exchange.apply(x, self.of_input, self.of_gradient), self.weight, self.bias)


class Row(swap.reference("tensor_parallel.RowParallelLinear")):
    of_output, of_gradient = staticmethod(all_reduced), staticmethod(same)

    def forward(self, x):
        total = _Exchange.apply(F.linear(x, self.weight), self.of_output, self.of_gradient)
        return total if self.bias is None else total + self.bias


COLUMN_PIECE, ROW_PIECE = "tensor_parallel.ColumnParallelLinear", "tensor_parallel.RowParallelLinear"


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class GradientOfTheInputNotSummed(Column):
    """The gradient of the input is the part through this rank's outputs alone, so all layers below learn from
    a part of it. All-reduce it in backward."""

    of_gradient = staticmethod(same)


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class GradientOfTheInputAveraged(Column):
    """The gradient of the input is averaged over ranks. Each rank has a part of a sum, not an estimate of the
    whole: sum without dividing."""

    of_gradient = staticmethod(lambda gradient: all_reduced(gradient) / WORLD)


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class InputSummedInForward(Column):
    """The input is all-reduced in forward, though every rank has the same one, so it is multiplied by the
    number of ranks. Copy it, and all-reduce its gradient."""

    of_input = staticmethod(all_reduced)


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class WholeWeightOnEveryRank(Column):
    """Each rank keeps the whole weight, so nothing is saved and the outputs are all of them. Keep this rank's
    rows."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class RowsOfTheOtherRank(Column):
    """The rows are those of another rank: the index counts from the end. Rank r has the r-th part, of which
    the row-parallel layer has the inputs."""

    def __init__(self, linear):
        super().__init__(linear)
        other = dist.get_world_size() - 1 - dist.get_rank()
        self.weight = nn.Parameter(part(linear.weight.detach(), other).clone())
        if linear.bias is not None:
            self.bias = nn.Parameter(part(linear.bias.detach(), other).clone())


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class EverySecondRow(Column):
    """The rows are dealt out in turn, one to each rank, where the other layers take contiguous parts, so
    outputs and weights do not fit together. Use one contiguous part in all layers."""

    def __init__(self, linear):
        super().__init__(linear)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.weight = nn.Parameter(linear.weight.detach()[rank::world_size].clone())
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach()[rank::world_size].clone())


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class ColumnBiasForgotten(Column):
    """The bias is not added. Each rank adds the part of the bias that belongs to its outputs."""

    def forward(self, x):
        return F.linear(_Exchange.apply(x, self.of_input, self.of_gradient), self.weight)


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class OutputsGathered(Column):
    """The outputs of all ranks are gathered, which costs an exchange and makes every rank compute the rest on
    all hidden units. Keep the part of this rank: the next layer is split by rows."""

    def forward(self, x):
        own = super().forward(x)
        parts = [torch.zeros(*own.shape[:-1], len(w)) for w in torch.zeros(D_OUT).tensor_split(WORLD)]
        dist.all_gather(parts, own.detach().contiguous())
        return own + 0 * sum(p.sum() for p in parts)


@step.mistake(COLUMN_PIECE, source="written for this catalogue")
class RemainingRowsDropped(Column):
    """Every rank has d_out // world rows, and those that are left over belong to no rank. Split unevenly, or
    refuse such sizes."""

    def __init__(self, linear):
        super().__init__(linear)
        size = len(linear.weight) // WORLD
        rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        self.weight = nn.Parameter(linear.weight.detach()[rows].clone())


@step.mistake(ROW_PIECE, source="written for this catalogue")
class OutputNotSummed(Row):
    """The output is the contribution of this rank's inputs alone, so ranks continue with different
    activations. All-reduce the output."""

    of_output = staticmethod(same)


@step.mistake(ROW_PIECE, source="written for this catalogue")
class OutputAveraged(Row):
    """The contributions are averaged over ranks, so the output is too small by their number. They are parts
    of one sum: do not divide."""

    of_output = staticmethod(lambda output: all_reduced(output) / WORLD)


@step.mistake(ROW_PIECE, source="written for this catalogue")
class GradientOfTheOutputSummed(Row):
    """The gradient of the output is all-reduced in backward too. Every rank has the whole gradient already,
    so weights learn as many times too fast as there are ranks; pass it on as it is."""

    of_gradient = staticmethod(all_reduced)


@step.mistake(ROW_PIECE, source="written for this catalogue")
class BiasOnEveryRank(Row):
    """The bias is added before the sum, once on every rank, so it counts as many times as there are ranks.
    Add it after the all-reduce."""

    def forward(self, x):
        return _Exchange.apply(F.linear(x, self.weight, self.bias), self.of_output, self.of_gradient)


@step.mistake(ROW_PIECE, source="written for this catalogue")
class RowBiasForgotten(Row):
    """The bias is never added. Add it once, after the contributions of all ranks are summed."""

    def forward(self, x):
        return _Exchange.apply(F.linear(x, self.weight), self.of_output, self.of_gradient)


@step.mistake(ROW_PIECE, source="written for this catalogue")
class ColumnsOfTheOtherRank(Row):
    """The columns are those of another rank, so inputs meet the weights of other hidden units. Rank r has the
    r-th part of the columns."""

    def __init__(self, linear):
        super().__init__(linear)
        other = dist.get_world_size() - 1 - dist.get_rank()
        weight = linear.weight.detach()
        self.weight = nn.Parameter(
            part(weight, other if weight.shape[1] % 2 == 0 else dist.get_rank(), 1).clone()
        )


@step.mistake(ROW_PIECE, source="written for this catalogue")
class SplitByRows(Row):
    """The weight is split along its outputs instead of its inputs, and does not fit the hidden units of this
    rank. Split dimension 1 of (d_out, d_in)."""

    def __init__(self, linear):
        super().__init__(linear)
        self.weight = nn.Parameter(part(linear.weight.detach(), dist.get_rank()).clone())


SWIGLU = "tensor_parallel.TensorParallelSwiGLU"


class Network(swap.reference("tensor_parallel.TensorParallelSwiGLU")):
    """A right one: what the mistakes change."""

    def __init__(self, ffn):
        super().__init__(ffn)


@step.mistake(SWIGLU, source="written for this catalogue")
class GateNotActivated(Network):
    """The activation is missing, so the product of two linear maps is all that remains of the gate. Apply
    silu to the output of w1 before the product."""

    def forward(self, x):
        return self.w2(self.w1(x) * self.w3(x))


@step.mistake(SWIGLU, source="written for this catalogue")
class ActivationOnTheProduct(Network):
    """silu is applied to the product W1 x * W3 x instead of to W1 x. Activate the gate, then multiply."""

    def forward(self, x):
        return self.w2(F.silu(self.w1(x) * self.w3(x)))


@step.mistake(SWIGLU, source="written for this catalogue")
class GateAndValueSwapped(Network):
    """silu is applied to W3 x instead of W1 x, so the two matrices change roles. The gate is w1."""

    def forward(self, x):
        return self.w2(F.silu(self.w3(x)) * self.w1(x))


@step.mistake(SWIGLU, source="written for this catalogue")
class HiddenUnitsSummedFirst(Network):
    """Hidden units are all-reduced before the last matrix, which adds up different units of different ranks.
    Only the output of the row-parallel layer is a sum over ranks."""

    def forward(self, x):
        hidden = F.silu(self.w1(x)) * self.w3(x)
        whole = torch.zeros(*hidden.shape[:-1], 3)
        whole[..., : hidden.shape[-1]] = hidden
        return self.w2(_Exchange.apply(whole, all_reduced, same)[..., : hidden.shape[-1]])
