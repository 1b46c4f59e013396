"""What runs beneath a model, written by hand: online softmax, collectives, parallel training."""
