"""A language model from scratch, one verified piece at a time, that then really trains.

Read it in this order; a file imports only from the floors below it.

    floor 0     functional.py     the mathematics: softmax, attention, cross-entropy, ...
                adjusting.py      min-p and repetition penalty: what is done to scores before a token is drawn
                optim.py          AdamW, gradient clipping, the learning-rate schedule
                bpe.py            learn a vocabulary from text
                files.py          text and JSON read with the place of every mistake; files written whole
                data.py           token files -> batches
                theirs.py         a file of somebody's own: which pieces it has, whether they fit
                questions.py      questions with answers that can be checked
                config.py         every option, its default and its meaning
                programs.py       the options of the programs around training
                device.py         where to compute, and how precisely
                signals.py        being asked to stop
                followers.py      who is told of a run as it goes on: the terminal, Weights & Biases
                watch.py          what goes wrong in a step, and where it began
    floor 1     corpus.py         where texts are found, how they are split
                presets.py        options in YAML files; those in configs/ have names
                run.py            the run directory: where a training run writes all it knows
                vocabulary.py     a learned vocabulary, and its files
                tasks.py          small tasks whose right answers are known
                layers.py         the mathematics with weights: Linear, RMSNorm, attention, ...
                checkpoint.py     a model and its optimizer <-> one file
    floor 2     tokenizer.py      text <-> token ids with a learned vocabulary
                sources.py        where documents come from: files, standard input, data sets by name
                command_line.py   the options that somebody typed
                records.py        a run as somebody reads it
                trials.py         a sweep file -> the training runs that it asks for
                layouts.py        what transformers calls the parts of a model
                model.py          TransformerLM, Llama-style and GPT-2-style from one config
    floor 3     plot.py           runs -> figures
                exchange.py       vocabularies of Hugging Face and tiktoken
                shards.py         token files on disk
                transplant.py     weights between our models and a layout of transformers
                likelihood.py     what does a model say of each token of a text?
    fast        fast/             twins of pieces, made for speed, with a map of their own
    floor 4     charts.py         figures of a sweep
                compare.py        runs side by side, printed and as a page
                streaming.py      token ids -> text as they come, up to a stop string
                chat.py           conversations <-> token ids, and which of them are learned
                choices.py        questions with several answers, of which a model picks one
                packing.py        documents -> token files, in steps that a kill cannot tear
                swap.py           whose pieces are in use: the reference's, its twins, or yours
    floor 5     sweep.py          train and compare many settings
                prepare.py        raw text -> tokenizer and token files, once
                evaluate.py       how good is a model on text it has not seen?
                generate.py       let a model write
                memory.py         how much memory will training take?
    floor 6     session.py        a training run as it stands
                answers.py        conversations -> batches in which answers are learned
                inherit.py        the weights of another run to begin with
                tokenizer_cli.py  the program of the tokenizer: train, encode, inspect, compare
                checkpoint_cli.py the program of checkpoints: verify, list, prune
                export.py         a run -> a folder that transformers reads
                import_model.py   a folder of transformers -> a run
                evaluate_cli.py   the program of evaluation: models side by side, on text and on questions
                lm_harness.py     a model for EleutherAI's lm-evaluation-harness
    floor 7     generate_cli.py   the program of generate: prompts, samples, files
                monitor.py        the numbers of training steps: metrics, spikes, skipped steps
    floor 8     chat_cli.py       the program of chat: a conversation in the terminal
                launch.py         from options to a run that can take its first step
                loop.py           the training loop: steps, evaluation, samples, checkpoints
                find_lr.py        which learning rate? a short run through all of them
                probe.py          can this stack of pieces learn? tasks with known answers
    floor 9     job.py            a training job, from options to an exit status
    floor 10    train.py          the program of training
                sft.py            teach a trained model to answer
    learn       learn/            write the pieces yourself, with a map of its own
"""

__version__ = "0.1.0"
