"""A language model from scratch, one verified piece at a time, that then really trains.

`core` is the book: start there. A wing imports only the wings above it in this list.

    core           the model, its training and its tokenizer, written by hand
    runs           the run directory, the only interface between programs
    user_code      a Python file of yours with pieces
    systems        beneath a model, by hand: FlashAttention, parallel training
    alignment      post-training by hand: policy gradients, GRPO, DPO, LoRA
    quality        data quality by hand: masks, Gopher rules, duplicate lines, MinHash
    fast           fast implementations of core's pieces: Numba on CPU, Triton on GPU
    cli            options of the commands and their parsing
    swap           selects the implementation of each piece: reference, fast, yours
    data           text to token files, conversations to examples
    inference      generating text
    interop        Hugging Face transformers
    evaluation     loss, multiple choice, lm-evaluation-harness
    analysis       plots, comparisons, sweeps
    training       the training loop and everything around one step
    post_training  reinforcement learning from rewards, preference optimization
    doctor         checks of a machine, plans of memory and speed
    learn          the courses: lessons, checks, the catalogue of mistakes
    lab            the web page over run directories

The other files here are the commands: `llm-basics --help` lists them.
"""

__version__ = "0.1.0"
