"""Fast twins: the same names with the same results as in the modules above, made for speed.

They read from the bottom up as well; a file imports only from lines above it, from floors 0 to 3, and from
what it is the twin of.

    floor 1     machine.py               Python to machine code, by Numba
                products.py              products of matrices
                kernels.py               Python to programs on a graphics card, by Triton
                cards.py                 whether Triton works here
    floor 2     threads.py               work that several threads share
                scanner.py               where each pre-token ends: two patterns, written as loops over bytes
                vectors.py               rows of numbers: products, norms, activations as loops
                tiles.py                 products of matrices as loops: sums that stay in registers
                triton_norm.py           RMSNorm: each vector read once
                triton_cross_entropy.py  the loss: softmax that does not wait for its maximum
                triton_blocks.py         blocks of queries and keys: which see each other, where they lie
                triton_vectors.py        one token's products, norms and activations
    floor 3     words.py                 a hash table of pre-tokens
                merging.py               all pairs of neighbors, and the most frequent again and again
                derivatives.py           rows of numbers, and what a loss changes by with them
                heads.py                 attention as loops, with its gradient
                directions.py            Muon as loops, a matrix at a time
                triton_attention.py      FlashAttention: the scores are never written down
                triton_decoding.py       one token through a transformer, in five kernels a block
    floor 4     chunks.py                files of any size, piece by piece, on threads
                encoding.py              from bytes to ids: scan, look up, merge what is new
                decoding.py              a transformer as loops, for some tokens of one text
                gradient.py              the steps of a model's forward and backward pass
                static.py                one token through a model, for a CUDA graph
    floor 5     bpe.py                   bpe.train_bpe and what it is made of
                tokenizer.py             tokenizer.Tokenizer
                data.py                  batches for a GPU that does not wait for them
                functional.py            the mathematics through torch's fused kernels
                layers.py                attention's three products as one
                optim.py                 the optimizer, all parameters at once
                weights.py               a model's weights for loops, and which models they can read
                program.py               a model as a list of steps
    floor 6     learning.py              gradients of a batch by loops, on several threads
                generate.py              generate.generate
    floor 7     update.py                a loss in pieces, and steps that do not wait for a GPU
"""
