"""What several tests share: a tiny config, the program as a user starts it, and what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

import launch as launch_py
from configs import quickstart
from resnet_jax import train_state
from resnet_jax.cli.tools import main as resnet_jax
from resnet_jax.runs.exits import exit_on_user_error

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SEARCH = ("-m", "resnet_jax", "search")


def make_tiny_config(cache_dir: str) -> ConfigDict:
    """What `tiny_config` is, for fixtures that live longer than a test."""
    config = quickstart.get_config()
    config.num_epochs = 2.0
    config.schedule.warmup_epochs = 0.5
    config.eval_every_epochs = 1
    config.log_every_steps = 10
    config.model.channel_list = (8, 16)
    config.model.block_list = (1, 1)
    config.data.cache_dir = cache_dir
    config.pipeline, config.model.dtype = "tf_data", "float32"
    return config


def key_of(value: Any) -> Any:
    """Something that is equal for equal configs, and for the same functions of equal configs."""
    if isinstance(value, ConfigDict):
        return value.to_json_best_effort(sort_keys=True)
    if isinstance(value, partial):
        return (
            value.func,
            tuple(map(key_of, value.args)),
            tuple((k, key_of(v)) for k, v in sorted(value.keywords.items())),
        )
    return value


def made_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, except that equal arguments give the very object that they gave before.

    It is made from a copy of the config, which a test may go on to change.
    """
    made: dict[Any, Any] = {}

    @wraps(function)
    def make(*arguments: Any, **named: Any) -> Any:
        key = tuple(map(key_of, arguments)), tuple((k, key_of(v)) for k, v in sorted(named.items()))
        if key not in made:
            copies = [
                value.copy_and_resolve_references() if isinstance(value, ConfigDict) else value for value in arguments
            ]
            made[key] = function(*copies, **named)
        return made[key]

    return make


def make_state(config: ConfigDict, *arguments: Any) -> train_state.TrainState:
    """What `train_state.create` returns, by one program, as in `setup`, in place of one for each array."""
    state: train_state.TrainState = jax.jit(partial(train_state.create, config, *arguments))()
    return state


def launch(
    *arguments: object,
    program: Sequence[str] = (str(ROOT / "launch.py"),),
    prefix: Sequence[str] = (),
    timeout: float = 1800,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run `launch.py`, or another program, as a user does; `prefix` is a command that starts it."""
    return subprocess.run(
        [*prefix, sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def tool(*arguments: object) -> None:
    """Run a tool in this process; as for a user, a mistake is one line on stderr and exit code 2."""
    with exit_on_user_error():
        resnet_jax(list(map(str, arguments)))


def launch_here(*arguments: object) -> None:
    """Run `launch.py` in this process; as for a user, a mistake is one line on stderr and exit code 2."""
    with exit_on_user_error():
        launch_py.main(list(map(str, arguments)))


def mistake_of_tool(
    capture: pytest.CaptureFixture[str], *arguments: object, program: Callable[..., None] = tool
) -> str:
    """Run a tool in this process with a mistake: exit code 2, and one line on stderr, which is returned."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        program(*arguments)
    assert stop.value.code == 2
    (line,) = capture.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def start(
    *arguments: object,
    program: Sequence[str] = (str(ROOT / "launch.py"),),
    prefix: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """Start `launch.py`, or another program, without waiting for its end."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a child inherits it: nohup would have it ignored
    try:
        return subprocess.Popen(
            [*prefix, sys.executable, *program, *map(str, arguments)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGHUP, hangup)


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    """What a process prints up to the first line with this beginning."""
    seen = []
    assert process.stdout
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            break
    return "".join(seen)


def saved_by_signal(process: subprocess.Popen[str], signum: signal.Signals, directory: Path, seconds: float) -> int:
    """Send a run a signal: it ends within so many seconds, says so in one line, and has saved the step that is returned."""
    sent = time.monotonic()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=600)
    assert time.monotonic() - sent < seconds
    assert process.returncode == 128 + signum
    (line,) = stderr.splitlines()
    found = re.search(rf"stopped by {signum.name} at step (\d+) of", line)
    assert found, line
    assert (directory / "checkpoints" / found[1]).is_dir()
    return int(found[1])


def rows(directory: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without times and speeds, which differ from run to run."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
        for row in found
        if split in (None, row["split"])
    ]


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr, with these words in it."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def orbax_drops_its_tasks(test: Callable[..., None]) -> Callable[..., None]:
    """Orbax abandons the tasks of a restore that failed, and Python warns of them as it collects them."""
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    marked: Callable[..., None] = pytest.mark.usefixtures("collect")(ignore(test))
    return marked
