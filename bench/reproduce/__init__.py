"""Do the claims of five systems hold at a small scale? One claim a command; docs/reproduction.md has the results."""
