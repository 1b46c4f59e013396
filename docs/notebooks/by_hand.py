# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention and a training step by hand
#
# Two computations in plain tensors, each compared with the library's.

# %% [markdown]
# ## Attention
#
# Three tokens, one head of two features. The scores of a query are its products with all keys, over
# the square root of their size; a token must not see what follows, so those scores are minus
# infinity; softmax turns scores into weights that sum to 1; the output is the mean of the values with
# these weights (arXiv 1706.03762).

# %%
import math

import torch

from llm_basics.core import functional as F
from llm_basics.core import layers, optim, trainer

torch.manual_seed(0)
query, key, value = torch.randn(3, 3, 2)
scores = query @ key.T / math.sqrt(2)
may_attend = torch.ones(3, 3, dtype=torch.bool).tril()
scores[~may_attend] = -math.inf
weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
weights

# %%
by_hand = weights @ value
torch.testing.assert_close(by_hand, F.scaled_dot_product_attention(query, key, value, may_attend))
by_hand

# %% [markdown]
# ## A training step
#
# The smallest language model: an embedding of 3 features for each of 5 tokens, and a linear layer to
# the logits of the next token. The loss is the mean of `-log p(target)`.

# %%
embedding, linear = layers.Embedding(5, 3), layers.Linear(3, 5)
inputs, targets = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])
E, W = embedding.weight.detach().clone(), linear.weight.detach().clone()

hidden = E[inputs]
logits = hidden @ W.T
p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
loss = -p[torch.arange(4), targets].log().mean()
torch.testing.assert_close(loss, trainer.compute_loss(linear(embedding(inputs)), targets).detach())
loss

# %% [markdown]
# The gradient of the loss with respect to the logits is `p - 1` at the target and `p` elsewhere, over
# the number of targets. The rest is the chain rule.

# %%
d_logits = p.clone()
d_logits[torch.arange(4), targets] -= 1
d_logits /= 4
d_W = d_logits.T @ hidden
d_E = torch.zeros_like(E).index_add(0, inputs, d_logits @ W)

trainer.compute_loss(linear(embedding(inputs)), targets).backward()
torch.testing.assert_close(d_W, linear.weight.grad)
torch.testing.assert_close(d_E, embedding.weight.grad)

# %% [markdown]
# AdamW (arXiv 1711.05101) divides the mean of the gradients by the root of the mean of their squares.
# In the first step both means are of one gradient, so every weight moves by about the learning rate,
# whatever the size of its gradient; weight decay pulls it toward 0.

# %%
lr, decay, eps = 0.1, 0.01, 1e-8
W_new = W * (1 - lr * decay) - lr * d_W / (d_W.abs() + eps)
E_new = E * (1 - lr * decay) - lr * d_E / (d_E.abs() + eps)

parameters = [embedding.weight, linear.weight]
optim.AdamW(parameters, lr=lr, weight_decay=decay, eps=eps).step()
torch.testing.assert_close(W_new, linear.weight.detach())
torch.testing.assert_close(E_new, embedding.weight.detach())
print("the same, to the last digits of float32")
