"""Merges that read texts: each method is found in its file by its name in a recipe."""
