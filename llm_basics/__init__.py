"""A language model from scratch, one verified piece at a time, that then really trains.

Read it in this order; a file imports only from the floors below it.

    floor 0     functional.py     the mathematics: softmax, attention, cross-entropy, ...
                optim.py          AdamW, gradient clipping, the learning-rate schedule
                bpe.py            learn a vocabulary from text
                data.py           documents -> token files on disk -> batches
                config.py         every option, its default and its meaning; presets in configs/
                device.py         where to compute, and how precisely
                run.py            the run directory: where a training run writes all it knows
    floor 1     layers.py         the mathematics with weights: Linear, RMSNorm, attention, ...
                tokenizer.py      text <-> token ids with a learned vocabulary
                checkpoint.py     a model and its optimizer <-> one file
                command_line.py   the options that somebody typed
                plot.py           a run directory -> figures
    floor 2     model.py          TransformerLM, Llama-style and GPT-2-style from one config
    floor 4     prepare.py        raw text -> tokenizer and token files, once
                evaluate.py       how good is a model on text it has not seen?
                generate.py       let a model write
    floor 5     train.py          all of it together
"""

__version__ = "0.1.0"
