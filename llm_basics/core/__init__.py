"""The book: the model, its training and its tokenizer, written by hand."""
