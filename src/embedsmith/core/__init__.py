"""What every other room stands on: representations, batches, recipes, settings, the shelf, errors. Imports no room."""
