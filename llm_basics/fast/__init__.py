"""Fast twins: the same names with the same results as in the modules above, made for speed.

They read from the bottom up as well; a file imports only from lines above it, from floors 0 to 3, and from
what it is the twin of.

    floor 1     machine.py        Python to machine code, by Numba
    floor 2     scanner.py        where each pre-token ends: two patterns, written as loops over bytes
    floor 3     words.py          a hash table of pre-tokens
                merging.py        all pairs of neighbors, and the most frequent again and again
    floor 4     chunks.py         files of any size, piece by piece, on threads
                encoding.py       from bytes to ids: scan, look up, merge what is new
    floor 5     bpe.py            bpe.train_bpe and what it is made of
                tokenizer.py      tokenizer.Tokenizer
                decoding.py       a transformer as loops, for one token of one text
                static.py         one token through a model, for a CUDA graph
    floor 6     weights.py        a model's weights for those loops, and which models they can read
    floor 7     generate.py       generate.generate
"""
