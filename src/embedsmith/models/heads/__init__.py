"""Heads: what turns hidden states into dense, sparse and multi-vector representations."""
