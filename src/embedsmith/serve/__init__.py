"""A model and an index over HTTP: `embedsmith serve`."""
