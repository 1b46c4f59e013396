"""Activation checkpointing: the output again in the backward pass, with the same random numbers."""

import torch
from torch import nn

from llm_basics.learn import probes
from llm_basics.systems import activation_checkpointing as right

step = probes.Step("activation_checkpointing")
draw = probes.numbers(seed=1)

PIECE = "activation_checkpointing.checkpoint"


# --------------------------------------------------------------------------------------------------
# Probes


def layer(x, w):
    return torch.tanh(x @ w) ** 2


def scaled(x, factor, w, power):
    return (factor * x @ w) ** power


def rows(x, ids):
    return torch.exp(x)[ids]


def compare(about, function, inputs, *others):
    """`others` are arguments that are no tensors, each after one of the tensors."""

    def arguments(given):
        found = []
        for i, tensor in enumerate(given.values()):
            found += [tensor, *others[i : i + 1]]
        return found

    step.compare(
        about,
        lambda a, **given: a.run_checkpoint(function, *arguments(given)),
        lambda **given: function(*arguments(given)),
        inputs,
        axes="row feature",
    )


compare("a layer of two tensors", layer, {"x": draw(3, 4), "w": draw(4, 5)})
compare("arguments that are no tensors", scaled, {"x": draw(3, 4), "w": draw(4, 5)}, 0.5, 3)
compare("a tensor of ids", rows, {"x": draw(3, 4), "ids": torch.tensor([2, 0, 2])})


class Layer(nn.Module):
    """A layer with a weight, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.n_calls = nn.Parameter(probes.numbers(seed=2)(4, 4)), 0

    def forward(self, x):
        self.n_calls += 1
        return torch.tanh(torch.tanh(x @ self.weight) @ self.weight)


def trained(run):
    """What a backward pass leaves at a layer and its input; the gradient of the output is not constant."""
    module, x = Layer(), probes.numbers(seed=3)(3, 4).requires_grad_()
    run(module, x).square().sum().backward()
    return {"gradient of the weight": module.weight.grad, "gradient of x": x.grad}


def differ_in_gradients(expected, actual):
    for name, wanted in expected.items():
        found = actual[name]
        if found is None:
            return f"the {name} is missing"
        off = ((wanted - found).abs() > 1e-5).nonzero().tolist()
        if off:
            i = tuple(off[0])
            return f"the {name} at {list(i)} must be {wanted[i]:.5f}, got {found[i]:.5f}; {len(off)} wrong"
    raise AssertionError("the gradients are equal")


for about, run in (
    ("the weight of a layer gets its gradient", lambda checkpoint: checkpoint),
    (
        "a checkpoint within a checkpoint",
        lambda checkpoint: lambda f, x: checkpoint(lambda y: checkpoint(f, y) + y, x),
    ),
):
    step.value(
        about,
        lambda a, run=run: trained(run(a.run_checkpoint)),
        trained(run(lambda f, x: f(x))),
        words=differ_in_gradients,
    )


def calls(run):
    module, x = Layer(), probes.numbers(seed=3)(3, 4).requires_grad_()
    output = run(module, x)
    forward = module.n_calls
    output.sum().backward()
    with torch.no_grad():
        after = module.n_calls
        run(module, x)
    return {"forward": forward, "backward": after - forward, "without gradients": module.n_calls - after}


step.value(
    "how often the function is called",
    lambda a: calls(a.run_checkpoint),
    {"forward": 1, "backward": 1, "without gradients": 1},
    words=lambda expected, actual: f"calls of the function must be {expected}, got {actual}",
)


def kept(run):
    """Whether anything but the input and the weight is saved for the backward pass."""
    module, x = Layer(), probes.numbers(seed=3)(3, 4).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(module, x)
    return any(t.shape != module.weight.shape and not torch.equal(t, x) for t in saved)


step.value(
    "no activation is saved",
    lambda a: kept(a.run_checkpoint),
    False,
    words=lambda expected, actual: "activations of the function are saved for the backward pass",
)


def dropout(x):
    return x * (torch.rand_like(x) < 0.5)


def masks(run):
    """Of dropout: the output and the gradient of ones have the same zeros; two calls have not."""
    torch.manual_seed(3)
    x = torch.ones(40, requires_grad=True)
    outputs = [run(dropout, x) for _ in range(2)]
    torch.rand(5)  # of a later layer
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in outputs]
    return {
        "the gradient has the mask of the output": all(map(torch.equal, outputs, gradients)),
        "two calls have the same mask": torch.equal(*outputs),
        "the next random number": torch.rand(()).item(),
    }


def differ_in_masks(expected, actual):
    wrong = next(name for name in expected if expected[name] != actual[name])
    return f"{wrong}: must be {expected[wrong]}, got {actual[wrong]}"


step.value("dropout", lambda a: masks(a.run_checkpoint), masks(lambda f, x: f(x)), words=differ_in_masks)


def changed_in_place(a):
    x = torch.ones(3, requires_grad=True)
    y = x * 1
    output = a.run_checkpoint(torch.square, y)
    y.mul_(2)
    output.sum().backward()
    return {"result": x.grad}


def without_gradient(a):
    return {"result": a.run_checkpoint(Layer(), torch.ones(3, 4)).requires_grad}


for about, observe in (
    ("an argument that is changed in place is an error", changed_in_place),
    ("no argument that requires a gradient is an error", without_gradient),
):
    step.probes.append(probes.Probe(about, observe, lambda: {"error": "an error"}, 0.0, 0.0))


# --------------------------------------------------------------------------------------------------
# Wrong versions: each changes a part of a right one


class Parts:
    """Checkpointing in parts that a wrong version overrides."""

    def before_forward(self, ctx):
        ctx.states = right.random_states()

    def save(self, ctx, args):
        ctx.others = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.is_tensor = [isinstance(arg, torch.Tensor) for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, torch.Tensor)))

    def restored(self, ctx):
        saved = iter(ctx.saved_tensors)
        return [
            next(saved) if is_tensor else o for is_tensor, o in zip(ctx.is_tensor, ctx.others, strict=True)
        ]

    def run(self, ctx, function, args):
        return function(*args)

    def leaf(self, tensor):
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def run_again(self, ctx, args):
        with torch.enable_grad(), right.restored_random_states(ctx.states):
            return ctx.function(*args)

    def backward(self, output, grad_output, leaves):
        torch.autograd.backward(output, grad_output)
        return [x.grad if isinstance(x, torch.Tensor) and x.is_leaf else None for x in leaves]

    def check(self, args):
        if torch.is_grad_enabled() and not any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            raise ValueError("an argument must require a gradient")


def function_of(parts):
    own = parts()

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, *args):
            ctx.function = function
            own.before_forward(ctx)
            own.save(ctx, args)
            return own.run(ctx, function, args)

        @staticmethod
        def backward(ctx, grad_output):
            args = own.restored(ctx)
            leaves = [own.leaf(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            return (None, *own.backward(own.run_again(ctx, leaves), grad_output, leaves))

    def wrong(function, *args):
        own.check(args)
        return Wrong.apply(function, *args)

    wrong.__name__, wrong.__doc__ = parts.__name__, parts.__doc__
    return wrong


def mistake(source="written for this catalogue", same_as=None):
    def register(parts):
        step.mistake(PIECE, source=source, same_as=same_as)(function_of(parts))
        return parts

    return register


@step.mistake(PIECE, source="the usual first version")
def no_checkpoint(function, *args):
    """The function is called as it is, so all its activations stay in memory until the backward pass. Run it
    inside the forward method of an autograd.Function, where nothing is recorded."""
    Parts().check(args)
    return function(*args)


@mistake(same_as="no_checkpoint")
class ActivationsKeptInTheContext(Parts):
    """The graph of the first run is kept on ctx and used in the backward pass, so nothing is recomputed and
    nothing is saved. Keep the arguments, and run the function again."""

    def run(self, ctx, function, args):
        ctx.leaves = [self.leaf(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        with torch.enable_grad():
            ctx.output = function(*ctx.leaves)
        return ctx.output.detach()

    def run_again(self, ctx, args):
        self.kept = ctx.leaves
        return ctx.output

    def backward(self, output, grad_output, leaves):
        return super().backward(output, grad_output, self.kept)


@mistake("public implementations of checkpointing")
class RandomStateNotRestored(Parts):
    """The second run draws new random numbers, so dropout drops other units than in the forward pass, and
    the gradient is that of another function. Save the random state before the first run and set it for the
    second."""

    def run_again(self, ctx, args):
        with torch.enable_grad():
            return ctx.function(*args)


@mistake()
class RandomStateNotPutBack(Parts):
    """The random state is set for the second run and left there, so later layers and steps draw the same
    numbers again. Put back the state from before the second run."""

    def run_again(self, ctx, args):
        torch.set_rng_state(ctx.states[0])
        with torch.enable_grad():
            return ctx.function(*args)


@mistake()
class FixedSeed(Parts):
    """A fixed seed is set before both runs. They draw the same numbers, but so does every call: dropout
    drops the same units in all layers and steps. Save and restore the state instead."""

    def before_forward(self, ctx):
        torch.default_generator.manual_seed(0)

    def run_again(self, ctx, args):
        torch.default_generator.manual_seed(0)
        with torch.enable_grad():
            return ctx.function(*args)


@mistake()
class StateSavedAfterTheFirstRun(Parts):
    """The random state is saved after the first run, which has drawn its numbers by then. The second run
    draws the ones that follow. Save it before the function is called."""

    def run(self, ctx, function, args):
        output = function(*args)
        ctx.states = right.random_states()
        return output


@mistake()
class GradientOfTheOutputIgnored(Parts):
    """The backward pass starts from the sum of the outputs, without the gradient that it is given. That is
    right only if it is 1 everywhere. Call torch.autograd.backward(output, grad_output)."""

    def backward(self, output, grad_output, leaves):
        return super().backward(output, torch.ones_like(output), leaves)


@mistake("public implementations of checkpointing")
class ParametersGetNoGradient(Parts):
    """torch.autograd.grad is called for the gradients of the arguments only, so the parameters of the
    function have none and do not learn. torch.autograd.backward computes both."""

    def backward(self, output, grad_output, leaves):
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad_output))
        return [next(found) if any(x is w for w in wanted) else None for x in leaves]


@mistake()
class ParametersGetTheirGradientTwice(Parts):
    """backward is called twice on the second run, for the arguments and for the parameters. Gradients of
    leaves accumulate, so both are doubled. One call is enough."""

    def backward(self, output, grad_output, leaves):
        torch.autograd.backward(output, grad_output, retain_graph=True)
        return super().backward(output, grad_output, leaves)


@mistake()
class ArgumentsNotDetached(Parts):
    """The second run uses the saved tensors as they are, so its graph continues into the graph before them,
    and the arguments themselves have no grad. Detach them first, and let them require a gradient."""

    def leaf(self, tensor):
        return tensor


@mistake()
class DetachedWithoutAGradient(Parts):
    """The arguments are detached and do not require a gradient, so the second run records nothing for them.
    detach() clears requires_grad: set it as it was."""

    def leaf(self, tensor):
        return tensor.detach()


@mistake()
class GradientForEveryTensor(Parts):
    """Every tensor argument is made to require a gradient, also ids and masks, which cannot. Set
    requires_grad as the saved tensor had it."""

    def leaf(self, tensor):
        return tensor.detach().requires_grad_()


@mistake()
class SecondRunRecordsNothing(Parts):
    """The second run is under no_grad, as everything in a backward method can be, so its output has no
    graph. Run the function under torch.enable_grad()."""

    def run_again(self, ctx, args):
        with torch.no_grad(), right.restored_random_states(ctx.states):
            return ctx.function(*args)


@mistake("public implementations of checkpointing")
class SavedAsAttributes(Parts):
    """The tensors are kept as attributes of ctx. Autograd then does not notice when one is changed in place,
    and the second run silently computes something else. Use ctx.save_for_backward."""

    def save(self, ctx, args):
        ctx.args = args

    def restored(self, ctx):
        return list(ctx.args)


@mistake()
class OtherArgumentsAtTheEnd(Parts):
    """In the second run the arguments that are no tensors come after the tensors, not in their places.
    Remember the position of each argument."""

    def run_again(self, ctx, args):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        others = [x for x in args if not isinstance(x, torch.Tensor)]
        with torch.enable_grad(), right.restored_random_states(ctx.states):
            return ctx.function(*tensors, *others)


@mistake()
class FunctionRunTwiceInTheForwardPass(Parts):
    """The forward pass runs the function twice, once for the output and once more. It is run once there, and
    once in the backward pass."""

    def run(self, ctx, function, args):
        with right.restored_random_states(ctx.states):
            function(*args)
        return function(*args)


@mistake("torch.utils.checkpoint, which warns")
class NoErrorWithoutAGradient(Parts):
    """If no argument requires a gradient, the output has none, and the parameters of the function silently
    do not learn. Raise ValueError, unless gradients are off."""

    def check(self, args):
        pass
