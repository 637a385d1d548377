"""The workers of one machine end with the process that started them, however that ends."""

import signal
import subprocess
import sys

WORKER = """
import os, signal
from resnet_jax.search import local_workers
local_workers.end_with_parent()
print(os.getpid(), flush=True)
signal.pause()
"""
PARENT = f"""
import sys
from resnet_jax.search import local_workers
sys.exit(local_workers.run([sys.executable, "-c", {WORKER!r}], 2, []))
"""


def test_workers_end_when_their_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(2)}
        assert len(workers) == 2
        parent.kill()
        assert parent.stdout.read() == ""  # returns when the last process that can write to it has ended
    assert parent.returncode == -signal.SIGKILL


def test_workers_get_the_signals_of_their_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        for _ in range(2):
            parent.stdout.readline()
        parent.terminate()
        assert parent.stdout.read() == ""
    assert parent.returncode == 128 + signal.SIGTERM


def test_a_command_that_is_no_worker_goes_on(monkeypatch):
    from resnet_jax.search import local_workers

    monkeypatch.delenv("RESNET_JAX_PARENT", raising=False)
    monkeypatch.setattr(local_workers.threading, "Thread", lambda **_: sys.exit("a thread was started"))
    local_workers.end_with_parent()
