"""`core.layers` with merged projections."""

from jaxtyping import Float
from torch import Tensor

from llm_basics.core import layers as reference
from llm_basics.fast.cpu import linear


class MultiHeadSelfAttention(reference.MultiHeadSelfAttention):
    """`layers.MultiHeadSelfAttention` with one product for queries, keys and values."""

    def project(
        self, x: Float[Tensor, "... seq d_model"]
    ) -> tuple[
        Float[Tensor, "... seq d_model"], Float[Tensor, "... seq d_kv"], Float[Tensor, "... seq d_kv"]
    ]:
        """Queries, keys and values."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if not linear.should_merge(x):
            return super().project(x)
        q, k, v = linear.merged(x, [p.weight for p in projections], [p.bias for p in projections])
        return q, k, v
