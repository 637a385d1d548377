"""`metrics.jsonl`: one JSON object a line, and the same figures as TensorBoard events."""

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from resnet_jax.disk import files


class MetricsLog:
    """Appends to the `metrics.jsonl` of a run, and to its TensorBoard events.

    Args:
        directory: of the run.
        resume_step: the rows that will be written again are dropped: those of later steps, those of the test split (the
            last row of a run), and an incomplete last line.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        self._path, self._events_path = directory / "metrics.jsonl", directory / "tensorboard"
        with files.writable(self._events_path):
            self._events_path.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
            self._events = RecordWriter((self._events_path / name).open("wb", buffering=0))
        self._write_event(file_version="brain.Event:2")
        lines = _lines(directory)
        kept = [line for line, row in lines if row and row["step"] <= resume_step and row["split"] != "test"]
        if len(kept) < len(lines):
            files.write_text(self._path, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row: "step", "epoch", "split", "seconds", and its figures. TensorBoard has a clock of its own."""
        with files.writable(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        figures = {k: v for k, v in row.items() if k not in ("step", "epoch", "split", "seconds") and v is not None}
        values = [Summary.Value(tag=f"{row['split']}/{name}", simple_value=v) for name, v in figures.items()]
        self._write_event(step=row["step"], summary=Summary(value=values))

    def _write_event(self, **fields: Any) -> None:
        with files.writable(self._events_path):
            self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Close the events file."""
        self._events.close()


def metrics_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; damaged lines are left out."""
    return [row for _, row in _lines(directory) if row]


class Validation(NamedTuple):
    """An evaluation on the validation split, as its row says.

    Attributes:
        accuracy: 0..1.
        loss: the mean cross-entropy.
        standard_error: of the accuracy; 0 in a row of an earlier version, which did not log it.
    """

    accuracy: float
    loss: float
    standard_error: float = 0.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Validation":
        """Read a row."""
        return cls(row["accuracy"], row["loss"], row.get("standard_error", 0.0))


def validations(directory: Path) -> dict[int, Validation]:
    """Step -> validation, from the rows of `metrics.jsonl`."""
    return {
        row["step"]: Validation.of(row)
        for row in metrics_rows(directory)
        if row["split"] == "validation"
        and isinstance(row.get("accuracy"), float)
        and isinstance(row.get("loss"), float)
        and isinstance(row.get("standard_error", 0.0), float)
    }


def best_step(validated: Mapping[int, Validation]) -> int | None:
    """The step with the best validation, or None if there is none.

    Its accuracy is within one standard error of the highest: such a difference is no better than luck, so the lower loss
    decides, and then the later step. Validations are compared in the order of their steps. A resumed run, which keeps only
    its best checkpoint, therefore chooses the same one.
    """
    best: int | None = None
    highest = Validation(0.0, 0.0)
    for step, new in sorted(validated.items()):
        highest = max(highest, new, key=lambda validation: validation.accuracy)
        lowest = highest.accuracy - highest.standard_error
        before = None if best is None else validated[best]
        lower = before is None or new.loss <= before.loss or math.isnan(before.loss)
        if before is None or before.accuracy < lowest or (new.accuracy >= lowest and lower):
            best = step
    return best


def _lines(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line of `metrics.jsonl` with its row; {} for a line that is damaged or incomplete."""
    path = directory / "metrics.jsonl"
    text = files.readable(path).read_text(errors="replace") if path.exists() else ""
    return [(line, _row(line)) for line in text.splitlines(keepends=True)]


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError):
        return {}
    whole = line.endswith("\n") and isinstance(row, dict) and type(row.get("step")) is int and "split" in row
    return row if whole else {}
