"""Several workers on one machine: a process for each GPU, or for each share of the cores."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from resnet_jax import host
from resnet_jax.errors import UserError
from resnet_jax.runs import preemption


def local_gpus() -> list[str]:
    """The GPUs that JAX finds here, as CUDA_VISIBLE_DEVICES names them; asked in a process that then lets go of them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    ask = "import jax; print(jax.local_device_count() if jax.default_backend() == 'gpu' else 0)"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    count = int(asked.stdout) if asked.returncode == 0 else 0  # what is wrong, the worker will tell
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")[:count]
    return [str(i) for i in range(count)]


@contextlib.contextmanager
def _share(i: int, count: int, gpus: list[str]) -> Iterator[dict[str, str]]:
    """What the environment of a worker has besides this one's; processes that are started here have its share of cores."""
    if not hasattr(os, "sched_setaffinity"):  # not on macOS, where the workers share as they can
        yield {}
        return
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[i::count])
    try:
        yield {"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {}
    finally:
        os.sched_setaffinity(0, all_cores)


def check(count: int, gpus: list[str]) -> None:
    """Refuse more workers than there are GPUs, or cores where there is no GPU.

    Raises:
        UserError: saying how many there are.
    """
    there, what = (len(gpus), "GPU") if gpus else (host.usable_cores(), "core")
    if count > there:
        raise UserError(f"--workers={count} needs a {what} for each, and there are {there}: give at most {there}")


def run(command: list[str], count: int, gpus: list[str]) -> int:
    """Run several workers until all have ended; signals are handed on to them, and what they all say is told once.

    Args:
        command: that starts one.
        count: how many.
        gpus: one for each; none to share the cores alone.

    Returns:
        The exit code: 0 where all ended well, otherwise the greatest.
    """
    workers: list[subprocess.Popen[bytes]] = []

    def hand_on(signum: int, _: object) -> None:
        for worker in workers:
            worker.send_signal(signum)

    with contextlib.ExitStack() as stack:
        for signum in preemption.SIGNALS:
            stack.callback(signal.signal, signum, signal.signal(signum, hand_on))
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        for i in range(count):
            with _share(i, count, gpus) as more:
                # In a group of its own, a worker gets a Ctrl-C once, from here: a second would end it at once.
                workers.append(subprocess.Popen(command, env=os.environ | more, stderr=errors[i], process_group=0))
        said: set[str] = set()
        running = set(range(count))
        while running:
            for i in [i for i in running if workers[i].poll() is not None]:
                running.discard(i)
                errors[i].seek(0)
                lines = errors[i].read().splitlines()
                if (code := workers[i].returncode) < 0:
                    lines.append(f"a worker was killed by {signal.Signals(-code).name}: any other takes its trial up")
                for line in lines:
                    if line not in said:
                        print(line, file=sys.stderr, flush=True)
                        said.add(line)
            time.sleep(0.1)
    codes = [worker.returncode for worker in workers]
    return max(code if code >= 0 else 128 - code for code in codes)
