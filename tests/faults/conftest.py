"""One server of commands and one furnished workplace for all tests of faults."""

import pytest

from tests.faults.fuzz import Judge
from tests.faults.server import Server
from tests.faults.workplace import furnish, use


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    with Server() as server:
        base = furnish(root / "base")
        use(server, base)
        yield Judge(server, base, root)
