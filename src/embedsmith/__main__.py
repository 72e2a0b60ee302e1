"""`python -m embedsmith`, and so `torchrun -m embedsmith`."""

from embedsmith.cli import main

main()
