"""Side-by-side measurements against peers: one command each, every ratio from one run."""
