"""Parts of a bench that go wrong, in a module that is imported in no time."""

import sys
import time


def slow(name, **options):
    time.sleep(60)


def broken(name, **options):
    sys.exit(3)


def nothing():
    pass


def no_card():
    raise RuntimeError("CUDA error: initialization error")
