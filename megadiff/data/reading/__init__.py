"""Which sample comes when, and batches of them for training."""
