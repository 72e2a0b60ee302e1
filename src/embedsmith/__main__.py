"""`python -m embedsmith`, and so `torchrun -m embedsmith`."""

from embedsmith.cli.verbs import main

main()
