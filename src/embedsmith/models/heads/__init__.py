"""Heads: what a model makes of its token states, each a class on the shelf that names the file of its weights."""
