"""Merging methods that read weights alone: each is found in its file by its name in a recipe."""
