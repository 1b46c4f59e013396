"""Fast twins: the same names with the same results as in the modules above, made for speed.

They read from the bottom up as well; a file imports only from lines above it, and from floors 0 to 3.

    floor 1     machine.py        Python to machine code, by Numba
    floor 2     scanner.py        where each pre-token ends: two patterns, written as loops over bytes
    floor 3     words.py          a hash table of pre-tokens
                merging.py        all pairs of neighbors, and the most frequent again and again
    floor 4     chunks.py         files of any size, piece by piece, on threads
                encoding.py       from bytes to ids: scan, look up, merge what is new
    floor 5     bpe.py            bpe.train_bpe and what it is made of
                tokenizer.py      tokenizer.Tokenizer
                data.py           batches for a GPU that does not wait for them
                functional.py     the mathematics through torch's fused kernels
                optim.py          the optimizer, all parameters at once
                update.py         a loss that never holds the logits of a whole batch
"""
