"""Checkpoints to a checkpoint: `embedsmith.merge(...)`, task vectors, methods."""
