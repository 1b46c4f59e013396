"""Train a small model on the probabilities of a trained one (knowledge distillation).

uv run python -m llm_basics.distill --distill.teacher runs/LARGE --model.n_layers 2 --model.d_model 64
uv run python -m llm_basics.distill --distill.teacher runs/LARGE --config my_student.yaml --data book.txt
uv run python -m llm_basics.distill --resume runs/SMALL                    resume a stopped run
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

    from llm_basics.cli import parse
    from llm_basics.fast import kernel_cache
    from llm_basics.post_training import options as post_options

    options = parse.train_command_options(defaults=post_options.DistillConfig())
    if options.fast == "on":
        kernel_cache.start_for_training(options.tokenizer, options.train.device)

    from llm_basics.post_training import distill

    signals.run(distill.main, options)
