"""Kinds of evaluation tasks, how they are read, and how they are found by name."""
