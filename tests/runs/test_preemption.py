import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from resnet_jax import train_state
from resnet_jax.runs import preemption


def test_a_process_alone_acts_on_its_own_code_at_once():
    request = preemption.StopRequest()
    mesh = train_state.make_mesh()
    with request.capture_signals():
        assert request.agreed(mesh) == (None, False)
        assert request.agreed(mesh, save_due=True) == (None, True)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.agreed(mesh) == (128 + signal.SIGUSR1, True)


def test_several_processes_act_on_the_largest_code_of_the_call_before(monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    request, mesh = preemption.StopRequest(), train_state.make_mesh()
    with request.capture_signals():
        assert request.agreed(mesh, save_due=True) == (None, False)  # the others do not know it yet
        assert request.agreed(mesh, save_due=True) == (None, True)
        assert request.agreed(mesh) == (None, False)  # saved once
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed(mesh, save_due=True) == (None, False)
        assert request.agreed(mesh) == (128 + signal.SIGTERM, True)


def test_several_processes_agree_at_one_in_16_batches_of_an_evaluation(monkeypatch):
    """Each agreement is a program on all devices, and takes as long as a small batch."""
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    agreements = []
    monkeypatch.setattr(preemption, "_largest", lambda mesh: lambda codes: agreements.append(codes))
    request, mesh = preemption.StopRequest(), train_state.make_mesh()
    for _ in range(160):
        assert request.agreed(mesh, rarely=True) == (None, False)
    assert len(agreements) == 10


IN_C = """
import hashlib
from resnet_jax.runs.preemption import StopRequest
with StopRequest().capture_signals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # for many minutes, in which Python runs no handler
"""


def test_a_second_signal_ends_a_run_at_once():
    with subprocess.Popen([sys.executable, "-c", IN_C], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)  # as one: a lost terminal sends HUP twice
        time.sleep(preemption._SAME_SIGNAL_SECONDS + 1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_in_a_notebook_signals_do_not_end_the_process(monkeypatch):
    request, ended = preemption.StopRequest(ends_process=False), []
    monkeypatch.setattr(preemption, "_SAME_SIGNAL_SECONDS", math.inf)
    with request.capture_signals(), request.exit_within(0.0, end=ended.append):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as one: timeout(1) may send it twice
        assert request.exit_code() == 128 + signal.SIGINT
        monkeypatch.setattr(preemption, "_SAME_SIGNAL_SECONDS", -1.0)  # from here on, every signal is another one
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert ended == []
    assert request.exit_code() == 128 + signal.SIGINT


def test_signals_of_others_reach_their_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    handler = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with preemption.StopRequest().capture_signals():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert os.read(reader, 1) == bytes([signal.SIGUSR2])
    finally:
        signal.signal(signal.SIGUSR2, handler)
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("seconds", [0.0, None])
def test_the_time_limit_holds_only_once_the_clock_runs(seconds):
    request = preemption.StopRequest(seconds)
    assert request.exit_code() is None
    request.start_clock()
    assert request.exit_code() == (None if seconds is None else preemption.TIME_LIMIT)


def test_outside_the_main_thread_signals_are_left_alone():
    handlers = []

    def capture():
        request = preemption.StopRequest()
        with request.capture_signals(), request.exit_within(1.0, end=handlers.append):
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=capture)
    thread.start()
    thread.join()
    assert handlers == [before]
