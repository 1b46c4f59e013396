"""Checkpoints: model, optimizer and iteration in a file, from which training resumes bit for bit."""

import copy
import io
import tempfile
from pathlib import Path

import torch
from torch import nn

from llm_basics import swap
from llm_basics.learn import probes
from llm_basics.runs import checkpoint

step = probes.Step("checkpoint")
draw = probes.numbers(seed=8)
save_checkpoint = swap.reference("checkpoint.save_checkpoint")
load_checkpoint = swap.reference("checkpoint.load_checkpoint")

# --------------------------------------------------------------------------------------------------
# Probes

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
# two of them before the checkpoint, two after
INPUTS = [draw(6, 3) for _ in range(4)]


def network(seed, build=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))):
    """A model and its optimizer. Both are of torch, so that nothing but the checkpoint can be wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    return model, torch.optim.AdamW(model.parameters(), **OPTIONS)


def train(model, optimizer, inputs):
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def saved_and_loaded(
    a, model, optimizer, other, other_optimizer, iteration=2, to=lambda folder: folder / "saved"
):
    """What loading returns. Saves to a path, or to a file in memory where `to` gives None."""
    with tempfile.TemporaryDirectory() as folder:
        out = to(Path(folder)) or io.BytesIO()
        a.run_save_checkpoint(model, optimizer, iteration, out)
        return a.run_load_checkpoint(
            io.BytesIO(out.getvalue()) if isinstance(out, io.BytesIO) else out, other, other_optimizer
        )


TRAINED, TRAINED_OPTIMIZER = network(0)
train(TRAINED, TRAINED_OPTIMIZER, INPUTS[:2])
AFTER_2 = weights_of(TRAINED)
train(TRAINED, TRAINED_OPTIMIZER, INPUTS[2:])
AFTER_4 = weights_of(TRAINED)


def trained():
    model, optimizer = network(0)
    train(model, optimizer, INPUTS[:2])
    return model, optimizer


def weights_back(a, to=lambda folder: folder / "saved"):
    other = network(1)
    saved_and_loaded(a, *trained(), *other, to=to)
    return weights_of(other[0])


step.value(
    "the weights, in another model of the same shape",
    weights_back,
    AFTER_2,
    rtol=1e-7,
    atol=0.0,
    contract="checkpoint",
)
step.value(
    "the number of steps",
    lambda a: saved_and_loaded(a, *trained(), *network(1), iteration=17),
    17,
    contract="checkpoint",
    words=lambda right, found: f"saved with iteration {right}, loading gives {found}",
)


def goes_on(a):
    other = network(1)
    saved_and_loaded(a, *trained(), *other)
    train(*other, INPUTS[2:])
    return weights_of(other[0])


step.value("two more steps, as in an uninterrupted run", goes_on, AFTER_4, contract="checkpoint")


def settings_back(a):
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = 0.007
    other, other_optimizer = network(1)
    other_optimizer.param_groups[0]["weight_decay"] = 0.9
    saved_and_loaded(a, model, optimizer, other, other_optimizer)
    return {name: other_optimizer.param_groups[0][name] for name in ("lr", "betas", "weight_decay")}


step.value(
    "the optimizer's options: learning rate, betas and weight decay",
    settings_back,
    {"lr": 0.007, "betas": (0.8, 0.9), "weight_decay": 0.1},
    contract="checkpoint",
)


def what_was_saved_goes_on(a):
    model, optimizer = trained()
    a.run_save_checkpoint(model, optimizer, 2, io.BytesIO())
    mode = model.training
    train(model, optimizer, INPUTS[2:])
    return {"in training mode": mode, "weights": weights_of(model)}


step.value(
    "the saved model, which must not change",
    what_was_saved_goes_on,
    {"in training mode": True, "weights": AFTER_4},
    beyond="training goes on after a checkpoint; the public test ends there",
)


def mode_after_loading(a):
    other = network(1)
    saved_and_loaded(a, *trained(), *other)
    return "training" if other[0].training else "evaluation"


step.value(
    "the mode of the loaded model",
    mode_after_loading,
    "training",
    beyond="training goes on after loading, with dropout; the public test ends there",
    words=lambda right, found: f"a model in {right} mode is in {found} mode after loading",
)
step.value(
    "an open file instead of a path",
    lambda a: weights_back(a, to=lambda folder: None),
    AFTER_2,
    contract="checkpoint",
    rtol=1e-7,
    atol=0.0,
)


def saved_twice(a):
    model, optimizer = trained()
    other = network(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        a.run_save_checkpoint(*network(3), 1, path)
        a.run_save_checkpoint(model, optimizer, 2, path)
        return [a.run_load_checkpoint(path, *other), weights_of(other[0])]


step.value(
    "a checkpoint that overwrites another",
    saved_twice,
    [2, AFTER_2],
    rtol=1e-7,
    atol=0.0,
    beyond="a run writes its newest checkpoint over the last one; the public test writes one",
)


def with_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_mean.copy_(torch.arange(4.0))
    return model


def statistics_back(a):
    other = network(1, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    saved_and_loaded(a, *network(0, with_statistics), *other)
    return other[0][1].running_mean.clone()


step.value(
    "buffers, which are part of the model besides parameters",
    statistics_back,
    torch.arange(4.0),
    axes="feature",
    contract="checkpoint",
)


def half_weights_back(a):
    other = network(1, lambda: nn.Linear(3, 4).bfloat16())
    saved_and_loaded(a, *network(0, lambda: nn.Linear(3, 4).bfloat16()), *other)
    return weights_of(other[0])


step.value(
    "bfloat16 weights",
    half_weights_back,
    weights_of(network(0, lambda: nn.Linear(3, 4).bfloat16())[0]),
    contract="checkpoint",
    rtol=1e-7,
    atol=0.0,
)


def refused(a, saved, loaded):
    """Whether a checkpoint is refused by a model that it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        a.run_save_checkpoint(*network(0, saved), 2, Path(folder) / "saved")
        model, _ = network(1, loaded)
        # of the saved model's sizes, so that only the weights can be what does not fit
        _, optimizer = network(1, saved)
        try:
            a.run_load_checkpoint(Path(folder) / "saved", model, optimizer)
        except NotImplementedError:
            raise
        except Exception:
            return "refused"
    return "accepted"


def biased():
    return nn.Linear(3, 4)


def unbiased():
    return nn.Linear(3, 4, bias=False)


def wider():
    return nn.Linear(3, 5)


for about, saved, loaded in (
    ("a checkpoint that lacks one of the model's weights", unbiased, biased),
    ("a checkpoint with a weight that the model does not have", biased, unbiased),
    ("a checkpoint with weights of other shapes", biased, wider),
):
    step.value(
        about,
        lambda a, saved=saved, loaded=loaded: refused(a, saved, loaded),
        "refused",
        beyond="weights that do not fit leave some of the model random, which an error shows at once",
        words=lambda right, found, about=about: f"{about} must raise an error, but is accepted",
    )

# --------------------------------------------------------------------------------------------------
# Mistakes: saving


def model_with(state):
    """A minimal model for save_checkpoint."""
    model = nn.Module()
    model.state_dict = lambda: state
    return model


@step.mistake("checkpoint.save_checkpoint", source="public solutions of CS336")
def optimizer_state_missing(model, optimizer, step, out, **state):
    """The optimizer's options are saved, but its moments are not. After loading they start at zero, and the
    loss jumps. Save all of optimizer.state_dict()."""
    settings = optimizer.state_dict() | {"state": {}}
    bare = copy.copy(optimizer)
    bare.state_dict = lambda: settings
    save_checkpoint(model, bare, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="public solutions of CS336")
def iteration_off_by_one(model, optimizer, step, out, **state):
    """The iteration is returned one higher than it was saved, so schedule and data skip a step at every
    restart. Save and return the number unchanged."""
    save_checkpoint(model, optimizer, step + 1, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def iteration_forgotten(model, optimizer, step, out, **state):
    """The iteration is not saved, and loading returns 0, so a resumed run restarts its warmup and its data.
    Save the iteration in the file."""
    save_checkpoint(model, optimizer, 0, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def weights_saved_in_half_precision(model, optimizer, step, out, **state):
    """The weights are saved in half precision. The file is smaller, but the loaded weights are rounded, and
    training does not continue exactly where it stopped. Save them in their own dtype."""
    rounded = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_checkpoint(model_with(rounded), optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def model_left_in_half_precision(model, optimizer, step, out, **state):
    """model.half() is called before saving, which converts the model itself, not a copy. Training continues
    with rounded weights, or fails. Save the state_dict as it is."""
    save_checkpoint(model.half(), optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def model_left_in_evaluation_mode(model, optimizer, step, out, **state):
    """model.eval() is called for saving, and train() is not called afterwards, so training continues without
    dropout. Saving does not depend on the mode; do not change it."""
    save_checkpoint(model.eval(), optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def buffers_forgotten(model, optimizer, step, out, **state):
    """Only model.parameters() are saved. Buffers, such as running statistics, are part of the model's state
    but are not parameters. Save model.state_dict()."""
    save_checkpoint(model_with(dict(model.named_parameters())), optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="public solutions of CS336")
def names_of_the_compiled_model(model, optimizer, step, out, **state):
    """The weights are saved from the model that torch.compile returns, whose names begin with _orig_mod, so
    an uncompiled model cannot load them. Save the state of the original model."""
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(model_with(prefixed), optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def paths_model_with(model, optimizer, step, out, **state):
    """The target is always opened as a path, so an open file or io.BytesIO fails. Open it only if it is a
    path; torch.save accepts both."""
    with open(out, "wb") as file:
        save_checkpoint(model, optimizer, step, file, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def open_files_model_with(model, optimizer, step, out, **state):
    """The target is always treated as an open file, so a path fails. Open it first if it is a str or a Path;
    torch.save accepts both."""
    content = io.BytesIO()
    save_checkpoint(model, optimizer, step, content, **state)
    out.write(content.getvalue())


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def earlier_file_kept(model, optimizer, step, out, **state):
    """If the file already exists, nothing is written, and a later checkpoint of the same name is lost.
    Overwrite the existing file."""
    if isinstance(out, io.BytesIO) or not Path(out).exists():
        save_checkpoint(model, optimizer, step, out, **state)


@step.mistake("checkpoint.save_checkpoint", source="written for this catalogue")
def weights_through_numpy(model, optimizer, step, out, **state):
    """The weights are converted to NumPy arrays, which do not support bfloat16, so a bfloat16 model cannot be
    saved. Save the tensors themselves."""
    arrays = {name: torch.from_numpy(t.detach().numpy()) for name, t in model.state_dict().items()}
    save_checkpoint(model_with(arrays), optimizer, step, out, **state)


# --------------------------------------------------------------------------------------------------
# Mistakes: loading


def weights_in(src):
    """The weights in a checkpoint, and everything else that a right loading returns."""
    content = src.read() if isinstance(src, io.BytesIO) else Path(src).read_bytes()
    tensors, about = checkpoint.read_checkpoint(io.BytesIO(content))
    prefix = "model."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, about, content


def load_optimizer(content, names, optimizer):
    """Load only the optimizer, with a placeholder for the model."""
    model = nn.Module()
    model.state_dict = lambda: names
    model.load_state_dict = lambda weights: None
    load_checkpoint(io.BytesIO(content), model, optimizer)


@step.mistake("checkpoint.load_checkpoint", source="public solutions of CS336; passes its suite")
def missing_weights_accepted(src, model, optimizer=None, restore_rng=False):
    """Weights are loaded with strict=False, which ignores names that do not match. A misnamed weight keeps
    its random initial value without an error; leave strict=True."""
    weights, about, content = weights_in(src)
    load_optimizer(content, weights, optimizer)
    model.load_state_dict(weights, strict=False)
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def other_shapes_passed_over(src, model, optimizer=None, restore_rng=False):
    """Weights with another name or shape are skipped, and only the rest is loaded. Part of the model keeps
    its random initial values without any message; raise an error."""
    weights, about, content = weights_in(src)
    load_optimizer(content, weights, optimizer)
    own = model.state_dict()
    fitting = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
    model.load_state_dict(fitting, strict=False)
    return about


@step.mistake("checkpoint.load_checkpoint", source="public solutions of CS336")
def optimizer_not_restored(src, model, optimizer=None, restore_rng=False):
    """The optimizer is not restored at all, neither its moments nor its learning rate, so the loss jumps
    after a restart. Call optimizer.load_state_dict."""
    return load_checkpoint(src, model)


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def settings_of_the_optimizer_not_restored(src, model, optimizer=None, restore_rng=False):
    """The moments are restored, but learning rate, betas and weight decay stay those of the new optimizer.
    Load its whole state_dict, param_groups included."""
    before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    about = load_checkpoint(src, model, optimizer)
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group |= settings
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def step_count_of_the_optimizer_lost(src, model, optimizer=None, restore_rng=False):
    """The moments are restored, but the optimizer's step counter restarts at 0, so bias correction makes the
    next steps too long. The counter is in optimizer.state_dict() too."""
    about = load_checkpoint(src, model, optimizer)
    for state in optimizer.state.values():
        state["step"] = torch.zeros(())
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def model_not_restored(src, model, optimizer=None, restore_rng=False):
    """The weights are read but never loaded into the model. Call model.load_state_dict; assigning to the dict
    that state_dict() returned has no effect."""
    weights, about, content = weights_in(src)
    load_optimizer(content, weights, optimizer)
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def parameters_replaced(src, model, optimizer=None, restore_rng=False):
    """The model gets new parameters, as with load_state_dict(..., assign=True), while the optimizer still
    refers to the old ones, so training changes nothing. Copy the values into the existing parameters."""
    about = load_checkpoint(src, model, optimizer)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def running_means_exchanged(src, model, optimizer=None, restore_rng=False):
    """The first and second moment are swapped when loading, so the next steps are wrong. Load the optimizer's
    state_dict as a whole instead of tensor by tensor."""
    about = load_checkpoint(src, model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs()
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def model_frozen_after_loading(src, model, optimizer=None, restore_rng=False):
    """The loaded parameters have requires_grad=False, as in inference code, so training cannot continue. Load
    the values into the existing parameters."""
    about = load_checkpoint(src, model, optimizer)
    model.requires_grad_(False)
    return about


@step.mistake("checkpoint.load_checkpoint", source="written for this catalogue")
def model_in_evaluation_mode_after_loading(src, model, optimizer=None, restore_rng=False):
    """model.eval() is called in loading, so training resumes without dropout, and without an error.
    Loading must not change the mode; call eval() where the model is evaluated."""
    about = load_checkpoint(src, model, optimizer)
    model.eval()
    return about
