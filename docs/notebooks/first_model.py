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
# # A first model
#
# Text, a tokenizer, a model, training, a sample, and a look inside: a language model by the library
# of `llm_basics`, in a minute on two CPU cores.
#
# In Colab, install it first: `!pip install git+ADDRESS`, with the address of your copy of the
# repository.

# %% [markdown]
# ## Text and tokenizer
#
# The text is the source code of modules of Python's standard library. Byte-pair encoding merges the
# most frequent pair of neighbors, again and again, until the vocabulary has 1,000 tokens.

# %%
import ast
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from llm_basics.analysis import inspection
from llm_basics.core import bpe, config, dataloader, generate, model, tokenizer, trainer

torch.manual_seed(0)
modules = sorted(Path(ast.__file__).parent.glob("a*.py"))
text_file = Path(tempfile.mkdtemp()) / "library.txt"
text_file.write_text("\n".join(path.read_text("utf-8") for path in modules), "utf-8")
vocab, merges = bpe.train_bpe(text_file, vocab_size=1000)
tokens = tokenizer.Tokenizer(vocab, merges)
[tokens.vocab[id] for id in tokens.encode("def read(self):")]

# %% [markdown]
# ## Model and training
#
# A Llama of two blocks. Before the first step it knows nothing: its loss is about `log(1000)`, 6.9.

# %%
shape = config.ModelConfig(vocab_size=1000, context_length=64, d_model=64, n_layers=2, n_heads=4)
lm = model.TransformerLM(shape)
shards = [ids for ids, *_ in tokens.encode_file(text_file)]
batches = dataloader.Batches(shards, batch_size=8, context_length=64)
training = trainer.Trainer(lm, config.TrainConfig(steps=200, lr=1e-2, warmup_steps=20))
for step in range(200):
    training.training_step(batches[step])
plt.plot(training.losses)
plt.xlabel("step")
plt.ylabel("loss, nats per token")
plt.show()

# %% [markdown]
# ## A sample

# %%
sample = generate.generate(lm, torch.tensor(tokens.encode("def ")), max_new_tokens=100)
print(tokens.decode(sample))

# %% [markdown]
# ## Inside: what each token attends to
#
# Row by row, a token's weights on itself and on the tokens before it; no weight is on what follows.

# %%
loaded = inspection.LoadedModel(lm, tokens)
found = inspection.attention(loaded, loaded.encode("def read(self, size):\n    return self."), layer=1)
names = [repr(token)[1:-1] for token in found.tokens]
figure, axes = plt.subplots(1, found.n_heads, figsize=(4 * found.n_heads, 4))
for head, axis in enumerate(axes):
    rows = [row + [0.0] * (len(names) - len(row)) for row in found.weights[head]]
    axis.imshow(rows, cmap="Blues")
    axis.set_title(f"head {head}")
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
plt.show()
