"""The steps of learning, one file each: what is checked, and the mistakes that are known."""
