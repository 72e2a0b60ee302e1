"""The verbs of the command line, a file a group. Rooms are imported inside the functions, so that `--help` costs no
torch."""
