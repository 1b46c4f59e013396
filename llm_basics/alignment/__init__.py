"""Post-training by hand: from a model that continues text to one that is rewarded for right answers."""
