"""Kinds of files and layouts of columns that records are read from."""
