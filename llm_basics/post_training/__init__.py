"""Post-training: reinforcement learning from rewards, preference optimization, distillation."""
