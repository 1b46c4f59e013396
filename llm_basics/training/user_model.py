"""Check of user models: checkpoints and warm starts require the parameters of the reference model."""

from torch import nn

from llm_basics import swap
from llm_basics.core import config
from llm_basics.core import model as models


def check_parameters(model: nn.Module, expected: config.ModelConfig) -> None:
    """Raise ValueError if the parameters of a user model do not match the model config."""
    if not swap.user_pieces():
        return
    with swap.reference_only():
        reference = models.TransformerLM(expected, device="meta").state_dict()
    found = model.state_dict()
    differences = [f"missing parameter {name}" for name in reference.keys() - found.keys()]
    differences += [f"unexpected parameter {name}" for name in found.keys() - reference.keys()]
    differences += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in reference.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if differences:
        listed = "; ".join(sorted(differences)[:3]) + (" ..." if len(differences) > 3 else "")
        raise ValueError(
            f"your model's parameters do not match the config: {listed}; implement the options of the "
            "config, or train without them (q_norm and k_norm: --model.no-qk_norm)"
        )
