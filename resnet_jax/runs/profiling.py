"""`launch.py --profile START:COUNT`: a trace of some steps of a run, and the operations that cost them most.

The trace lies in WORKDIR/profile: TensorBoard's profiler reads the folder, Perfetto the `.trace.json.gz` in it.
"""

import collections
import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from resnet_jax.errors import UserError
from resnet_jax.runs.hooks import Hook
from resnet_jax.runs.plan import Call


class Cost(NamedTuple):
    """What an operation costs, all its calls together.

    Attributes:
        name: the compiler's, of an operation of the compiled step; on a GPU the kernel's.
        milliseconds: without the operations that run inside it.
        share: of the milliseconds of all operations, 0..1.
        calls: how often it ran.
    """

    name: str
    milliseconds: float
    share: float
    calls: int


class Profile(Hook):
    """Traces the steps that `--profile` names.

    Args:
        text: "START:COUNT", the first step, counted from 1, and how many.

    Raises:
        UserError: if the text has another form.
    """

    def __init__(self, text: str) -> None:
        numbers = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})", text)
        if not numbers:
            raise UserError(
                f"--profile {text!r} must be START:COUNT, the first step to trace, counted from 1, and how many, such as 20:5"
            )
        self._first = int(numbers[1])
        self._last = self._first + int(numbers[2]) - 1
        self._phase = "ahead"  # or "running", or "done"

    def begin(self, directory: Path) -> None:
        """Note where the trace goes."""
        self._directory = directory / "profile"

    def check(self, first_step: int, total_steps: int) -> None:
        """Check that the run takes the steps to trace.

        Raises:
            UserError: if it does not.
        """
        if first_step == total_steps:
            raise UserError("--profile: the run is complete and takes no more steps: choose another --workdir")
        if not first_step < self._first <= self._last <= total_steps:
            raise UserError(
                f"--profile names steps {self._first} to {self._last}, but the run takes {first_step + 1} to {total_steps}: "
                "choose among these"
            )

    def before_call(self, call: Call, state: Any) -> None:
        """Start the trace before the call that holds its first step; a call is traced whole."""
        import jax

        if self._phase != "ahead" or call.end < self._first or jax.process_index() > 0:  # the first traces for all
            return
        jax.block_until_ready(state)  # so that no earlier step is in the trace
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the loop that it watches
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._first, self._phase = call.start + 1, "running"

    def after_dispatch(self, call: Call, metrics: Any) -> str:
        """End the trace after the call that holds its last step; returns the ten costliest operations."""
        import jax

        if self._phase != "running" or call.end < self._last:
            return ""
        jax.block_until_ready(metrics)
        return self.on_stop(call.end)

    def on_stop(self, step: int) -> str:
        """End a running trace; return the ten most expensive operations."""
        import jax

        if self._phase != "running":
            return ""
        jax.profiler.stop_trace()
        self._phase = "done"
        trace = max(self._directory.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            operations = costs(json.load(file)["traceEvents"])
        return f"{table(operations[:10])}\nsteps {self._first} to {step} are traced in {trace}"


def costs(events: list[dict[str, Any]]) -> list[Cost]:
    """The operations of a trace, the costliest first.

    Args:
        events: in Chrome's trace format, as `jax.profiler` writes them.
    """
    microseconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    under_way: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)  # thread -> nested operations
    for event in sorted(_operations(events), key=lambda e: (e["ts"], -e["dur"])):
        outer = under_way[event["pid"], event["tid"]]
        while outer and outer[-1]["ts"] + outer[-1]["dur"] <= event["ts"]:
            outer.pop()
        if outer:
            microseconds[outer[-1]["name"]] -= event["dur"]
        outer.append(event)
        microseconds[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    total = microseconds.total() or 1.0
    return [Cost(name, time / 1e3, time / total, calls[name]) for name, time in microseconds.most_common()]


def _operations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that are operations: those on a device's own timeline or, on a CPU, those that name one of XLA's."""
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("name") in ("process_name", "thread_name")
    }
    on_devices = {
        thread: name
        for thread, name in names.items()
        if thread[1] is not None and names.get((thread[0], None), "").startswith("/device:")
    }
    timelines = {thread for thread, name in on_devices.items() if name == "XLA Ops"} or {
        thread for thread, name in on_devices.items() if name.startswith("Stream")
    }
    complete = [event for event in events if event.get("ph") == "X"]
    if timelines:
        return [event for event in complete if (event["pid"], event["tid"]) in timelines]
    return [event for event in complete if "hlo_op" in event.get("args", {})]


def table(operations: list[Cost]) -> str:
    """A line an operation, under a heading."""
    lines = [f"{'ms':>10} {'share':>6} {'calls':>6}  operation"]
    lines += [f"{op.milliseconds:>10.3f} {op.share:>6.1%} {op.calls:>6}  {op.name}" for op in operations]
    return "\n".join(lines)
