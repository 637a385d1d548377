"""A PostgreSQL server of a test's own: a temporary folder, an unprivileged user, the loopback address."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _program(name: str) -> str | None:
    """The path of one of the server's programs, which Debian keeps out of the PATH."""
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(newest[-1]) if newest else None)


def _unprivileged() -> dict[str, int]:
    """The settings by which root starts a process as another user; the server refuses to be root's."""
    if os.getuid():
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database; the test is skipped where PostgreSQL is not installed."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if not (initdb and postgres):
        pytest.skip("PostgreSQL is not installed here: a search on it is not tested")
    pytest.importorskip("psycopg")
    who = _unprivileged()
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        data = Path(scratch) / "data"
        if who:
            os.chown(scratch, who["user"], who["group"])
        made = [initdb, "--pgdata", data, "--auth=trust", "--username=test", "--no-sync", "--encoding=UTF8"]
        subprocess.run(made, check=True, capture_output=True, cwd=scratch, **who)
        free.close()
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        command = [postgres, "-D", data, *(argument for setting in settings for argument in ("-c", setting))]
        with subprocess.Popen(command, cwd=scratch, stderr=subprocess.PIPE, text=True, **who) as process:
            assert process.stderr
            for line in process.stderr:
                if "ready to accept connections" in line:
                    break
            assert process.poll() is None
            try:
                yield f"postgresql://test@127.0.0.1:{port}/postgres"
            finally:
                process.terminate()  # waits for its clients: none is left
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=30)
                process.kill()
