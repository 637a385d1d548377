"""Run several workers on one machine: one process per GPU, or per share of the cores."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from resnet_jax import host
from resnet_jax.errors import UserError
from resnet_jax.runs import preemption

_LIFE = "RESNET_JAX_PARENT"  # the number of a worker's end of the pipe to its parent


def local_gpus() -> list[str]:
    """List the GPUs as in CUDA_VISIBLE_DEVICES; a separate process asks JAX, so that this one holds no GPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    ask = "import jax; print(jax.local_device_count() if jax.default_backend() == 'gpu' else 0)"
    probe = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    count = int(probe.stdout) if probe.returncode == 0 else 0  # a worker reports the error
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")[:count]
    return [str(i) for i in range(count)]


@contextlib.contextmanager
def _share(i: int, count: int, gpus: list[str]) -> Iterator[dict[str, str]]:
    """Yield additional environment variables of a worker; processes started meanwhile get its share of the cores."""
    if not hasattr(os, "sched_setaffinity"):  # macOS: the operating system shares the cores
        yield {}
        return
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[i::count] or all_cores)  # there may be more GPUs than cores
    try:
        yield {"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {}
    finally:
        os.sched_setaffinity(0, all_cores)


def check(count: int, gpus: list[str]) -> None:
    """Refuse more workers than there are GPUs, or cores on a machine without GPUs.

    Raises:
        UserError: if there are too few; the message says how many there are.
    """
    available, what = (len(gpus), "GPU") if gpus else (host.usable_cores(), "core")
    if count > available:
        raise UserError(
            f"--workers={count} needs a {what} for each worker, but there are {available}: use at most {available}"
        )


def end_with_parent() -> None:
    """In a worker: stop it by SIGTERM, as its parent would, when the parent has ended in any way. Elsewhere do nothing."""
    if _LIFE not in os.environ:
        return
    life = int(os.environ.pop(_LIFE))

    def wait() -> None:
        os.read(life, 1)  # returns at the end of the pipe, as nobody writes
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def run(command: list[str], count: int, gpus: list[str]) -> int:
    """Run several workers until all have ended; forward signals to them, and print equal lines of stderr once.

    Args:
        command: the command of a worker.
        count: number of workers.
        gpus: a GPU for each worker, or none to share the cores.

    Returns:
        The exit code: 0 if all succeeded, otherwise the largest.
    """
    workers: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, _: object) -> None:
        for worker in workers:
            worker.send_signal(signum)

    with contextlib.ExitStack() as stack:
        life, own_end = os.pipe()  # workers inherit one end; the kernel closes the other when this process ends
        stack.callback(os.close, life)
        stack.callback(os.close, own_end)
        for signum in preemption.SIGNALS:
            stack.callback(signal.signal, signum, signal.signal(signum, forward))
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        for i in range(count):
            with _share(i, count, gpus) as variables:
                # In its own process group, a worker gets Ctrl-C only from here; a second one would end it at once.
                variables[_LIFE] = str(life)
                workers.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | variables,
                        stderr=errors[i],
                        process_group=0,
                        pass_fds=[life],
                    )
                )
        printed: set[str] = set()
        running = set(range(count))
        while running:
            for i in [i for i in running if workers[i].poll() is not None]:
                running.discard(i)
                errors[i].seek(0)
                lines = errors[i].read().splitlines()
                if (code := workers[i].returncode) < 0:
                    lines.append(
                        f"a worker was killed by {signal.Signals(-code).name}: another worker continues its trial"
                    )
                for line in lines:
                    if line not in printed:
                        print(line, file=sys.stderr, flush=True)
                        printed.add(line)
            time.sleep(0.1)
    codes = [worker.returncode for worker in workers]
    return max(code if code >= 0 else 128 - code for code in codes)
