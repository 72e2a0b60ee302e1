"""From sources to the rows of every step: one batch a step, the same on every rank, resumable."""
