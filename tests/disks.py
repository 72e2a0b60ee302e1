"""A disk that is soon full, and one that cannot be written to."""

import os
import shutil
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


@pytest.fixture
def read_only(tmp_path):
    """Makes a copy of a folder in which this user can write nothing, by rights or by a mount. Skips where neither can
    be had."""
    made = []

    def copy_of(folder):
        copy = shutil.copytree(folder, tmp_path / "read only")
        made.append(copy)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:  # whom rights do not stop
            for options in (["--bind"], ["-o", "remount,ro,bind"]):
                if subprocess.run(["mount", *options, copy, copy], capture_output=True, check=False).returncode:
                    pytest.skip("nothing can be mounted here")
        return copy

    yield copy_of
    for copy in made:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", copy], capture_output=True, check=False)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
