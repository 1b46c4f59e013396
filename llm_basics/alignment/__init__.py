"""Post-training by hand: policy gradients, preference optimization, distillation and LoRA."""
