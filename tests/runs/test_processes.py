"""What several processes agree on; threads stand in for them here, and `tests/fault_injection` has real ones."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from resnet_jax import setup
from resnet_jax.data import datasets
from resnet_jax.runs import processes


@pytest.fixture
def as_processes(monkeypatch):
    """Run a function in a thread for each host's name, as if each were a process on that host."""

    def run(hosts, function):
        here, barrier, values = threading.local(), threading.Barrier(len(hosts)), {}

        def allgather(value):
            values[here.rank] = value
            barrier.wait(10)
            gathered = np.stack([values[rank] for rank in range(len(hosts))])
            barrier.wait(10)
            return gathered

        def process(rank):
            here.rank = rank
            return function(rank)

        monkeypatch.setattr(processes.jax, "process_count", lambda: len(hosts))
        monkeypatch.setattr(processes.jax, "process_index", lambda: here.rank)
        monkeypatch.setattr(processes.platform, "node", lambda: hosts[here.rank])
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
        monkeypatch.setattr(processes.multihost_utils, "sync_global_devices", lambda name: barrier.wait(10))
        with ThreadPoolExecutor(len(hosts)) as executor:
            return list(executor.map(process, range(len(hosts))))

    return run


@pytest.mark.parametrize(
    ("hosts", "turns"),
    [("aabb", [{0}, {2}, {1, 3}]), ("ab", [{0}, {1}]), ("aa", [{0}, {1}]), ("abab", [{0}, {1}, {2, 3}])],
)
def test_the_first_process_goes_first_then_one_of_each_host_then_the_others(as_processes, hosts, turns):
    """So a data set is downloaded once, or once on each host if its folder is not shared."""
    order = []

    def load(rank):
        with processes.in_turn():
            order.append(rank)

    as_processes(hosts, load)
    done = 0
    for turn in turns:
        assert set(order[done : done + len(turn)]) == turn
        done += len(turn)
    assert done == len(order)


def test_data_are_loaded_in_turn(tiny_config, monkeypatch):
    happened = []

    @contextlib.contextmanager
    def in_turn():
        happened.append("the turn begins")
        yield
        happened.append("the turn ends")

    load = datasets.load
    monkeypatch.setattr(processes, "in_turn", in_turn)
    monkeypatch.setattr(datasets, "load", lambda *args, **named: happened.append("load") or load(*args, **named))
    setup.setup(tiny_config)
    assert happened == ["the turn begins", "load", "the turn ends"]


def test_all_agree_only_if_each_does(as_processes):
    assert as_processes("ab", lambda rank: processes.all_agree(True)) == [True, True]
    assert as_processes("ab", lambda rank: processes.all_agree(rank == 0)) == [False, False]


def test_a_process_alone_waits_for_nobody():
    with processes.in_turn():
        assert processes.all_agree(True)
        assert not processes.all_agree(False)
