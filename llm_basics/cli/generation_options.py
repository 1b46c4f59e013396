"""Options of text generation shared by several commands: sampling, selection, quantization."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llm_basics.core import option_types

# maximum sequences per forward pass, and generated in parallel: they must fit into memory
BatchSize = Annotated[int, option_types.Range(ge=1, most=10**5)]


@dataclass(frozen=True)
class SamplingOptions(option_types.Options):
    """Sampling from the model's distribution."""

    max_new_tokens: option_types.Length = 200
    """Maximum number of new tokens; the end of the document stops earlier."""
    temperature: option_types.NonNegative = 0.8
    """0: greedy; 1: the model's distribution; above 1: flatter."""
    top_k: option_types.Count | None = None
    """Sample from the k most likely tokens only."""
    top_p: option_types.PositiveFraction | None = None
    """Nucleus sampling: the most likely tokens with this total probability (arXiv 1904.09751)."""
    min_p: option_types.Fraction | None = None
    """Minimum probability of a token, relative to the most likely one (arXiv 2407.01082)."""
    repetition_penalty: option_types.Positive = 1.0
    """Above 1: tokens already in the text become less likely; usually 1.2 (arXiv 1909.05858)."""
    seed: option_types.Seed = 0
    """Random seed of sampling."""


@dataclass(frozen=True)
class SelectionOptions(option_types.Options):
    """Selection among several samples (inference-time scaling)."""

    best_of: BatchSize | None = None
    """Keep the best of this many samples, by log-probability per token or by --reward."""
    majority: BatchSize | None = None
    """Keep the most frequent of this many samples (self-consistency, arXiv 2203.11171)."""
    reward: str | None = None
    """Function of a Python file that scores samples for --best_of, as in my_reward.py:score, with the
    parameters (prompt, response, expected)."""

    @property
    def n_candidates(self) -> int:
        """Number of samples to select from; 0 without selection."""
        return max(self.best_of or 0, self.majority or 0)

    def check_selection(self, temperature: float) -> None:
        """Raise ValueError for incompatible options."""
        if self.reward is not None and self.best_of is None:
            raise ValueError(f"reward needs best_of, the number of samples to score, got only {self.reward}")
        if self.n_candidates > 1 and temperature == 0:
            raise ValueError(
                "temperature must be above 0 for best_of and majority, got 0, at which all samples are equal"
            )

    def check_one_selection(self) -> None:
        """Raise ValueError if two selection methods are enabled."""
        if self.best_of is not None and self.majority is not None:
            raise ValueError(
                f"best_of cannot be combined with majority, got {self.best_of} and {self.majority}; omit one"
            )


@dataclass(frozen=True)
class QuantizationOptions(option_types.Options):
    """Quantization of weights and the key-value cache."""

    quantize: Literal["none", "int8", "int4"] = "none"
    """Store the weights of linear layers in 8 or 4 bits, with scales; embeddings and norms stay float32."""
    kv_cache: Literal["float32", "int8"] = "float32"
    """Store keys and values in 8 bits, with a scale for each token and head; without CPU or GPU kernels."""
