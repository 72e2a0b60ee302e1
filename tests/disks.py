"""A disk that is soon full."""

import subprocess

import pytest

SMALL = 2**20
"""Bytes of it."""


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of a megabyte of its own. Skips where this user may not mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
