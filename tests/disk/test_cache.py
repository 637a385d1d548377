"""The user's cache folder: private, and without incomplete programs."""

import os
import subprocess
import sys

import pytest

from resnet_jax.disk import cache

COMPILE = (
    "import jax; from resnet_jax.disk import cache; cache.keep_programs(); "
    "jax.jit(lambda x: 3 * x + 1)(1.0); print(jax.config.jax_compilation_cache_dir)"
)


def compiled_by_a_process(home):
    """What a process says that compiles a function with the cache in this folder: (the cache of programs, stderr)."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # of the tests
    command = [sys.executable, "-W", "always", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    "tear", [lambda b: b[: len(b) // 2], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b""]
)
def test_an_incomplete_compiled_program_is_removed_and_replaced(tmp_path, tear):
    programs, said = compiled_by_a_process(tmp_path)
    assert programs == str(tmp_path / "resnet_jax/xla")
    assert said == ""
    entries = sorted((tmp_path / "resnet_jax/xla").glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(tear(entry.read_bytes()))
    _, said = compiled_by_a_process(tmp_path)
    assert sorted(said.splitlines()) == [f"removed {entry}, a compiled program that is incomplete" for entry in entries]
    assert all(cache._is_whole(entry.read_bytes()) for entry in entries)
    assert compiled_by_a_process(tmp_path) == (programs, "")


def test_programs_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "old-cache").write_bytes(b"no program")
    cache._remove_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".checked"]
    (tmp_path / "new-cache").write_bytes(cache._ZSTANDARD)
    cache._remove_torn(tmp_path)
    read = []
    monkeypatch.setattr(cache, "_is_whole", lambda program: read.append(program) or True)
    os.utime(tmp_path / ".checked", (2**33, 2**33))  # after every program
    cache._remove_torn(tmp_path)
    assert read == []


def test_the_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "resnet_jax").mkdir(mode=0o755)  # as earlier versions made it
    assert cache.folder() == tmp_path / "resnet_jax"
    assert (tmp_path / "resnet_jax").stat().st_mode & 0o777 == 0o700
    programs, _ = compiled_by_a_process(tmp_path)
    assert os.stat(programs).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["resnet_jax", "resnet_jax/xla"])
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, what):
    (tmp_path / what).mkdir(parents=True)
    (tmp_path / what).chmod(0o777)
    (tmp_path / "resnet_jax").chmod(0o777 if what == "resnet_jax" else 0o700)
    programs, said = compiled_by_a_process(tmp_path)
    assert programs == "None"
    (line,) = said.splitlines()
    assert f"other users can write to {tmp_path / what}" in line
    assert list((tmp_path / "resnet_jax").rglob("*-cache")) == []


def test_a_cache_of_another_user_is_not_used_and_a_line_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    cache._say_once.cache_clear()
    assert cache.folder() is cache.folder() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'resnet_jax'} belongs to another user" in line
