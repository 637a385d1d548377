"""Scratch folders: those of processes that live stay, those of processes that were killed go."""

import subprocess
import sys

import pytest

from resnet_jax.disk import files

_HOLD = """
import sys
from pathlib import Path
from resnet_jax.disk import files
with files.scratch_directory(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("written")
    print(scratch, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing in `tmp_path`."""
    command = [sys.executable, "-c", _HOLD, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, tmp_path / process.stdout.readline().strip()
        process.kill()


def test_the_scratch_of_a_process_that_lives_stays(tmp_path, holder):
    process, scratch = holder
    with files.scratch_directory(tmp_path) as own:
        files.remove_scratch(tmp_path)
        assert own.is_dir()
        assert (scratch / "half").read_text() == "written"
    assert not own.exists()
    process.stdin.close()
    assert process.wait(60) == 0
    assert not list(tmp_path.iterdir())


def test_the_scratch_of_a_process_that_was_killed_goes_with_the_next_write(tmp_path, holder):
    process, scratch = holder
    process.kill()
    process.wait(60)
    assert scratch.is_dir()
    (other := tmp_path / ".incomplete-of-another-program").mkdir()
    files.write_text(tmp_path / "file", "whole")
    assert not scratch.exists()
    assert other.is_dir()
    assert (tmp_path / "file").read_text() == "whole"


def test_a_scratch_that_vanishes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    made, original = [], files.fcntl.flock

    def lock(descriptor, how):
        made.append(files.Path(f"/proc/self/fd/{descriptor}").readlink())
        if len(made) == 1:
            made[0].rmdir()
        original(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", lock)
    with files.scratch_directory(tmp_path) as scratch:
        assert scratch == made[1] != made[0]
        assert scratch.is_dir()


def test_an_error_in_the_block_is_raised_and_the_scratch_goes(tmp_path):
    with pytest.raises(FileNotFoundError, match="of the block"), files.scratch_directory(tmp_path):
        raise FileNotFoundError("of the block")
    assert not list(tmp_path.iterdir())
