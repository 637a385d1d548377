"""Every command of README.md and docs/*.md runs: as it stands, or on a tiny config, or at least its words are checked.

The commands of a document run in the order in which they stand, in one folder and one process. A command that no rule
below knows fails the test.
"""

import functools
import importlib.util
import os
import pickle
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import waitress
from helpers import DOCUMENTS, ROOT
from PIL import Image

import launch
from resnet_jax.cli import tools as command
from resnet_jax.search import studies

Argv = list[str]


class Code(NamedTuple):
    """A command, or a block of Python, and where it stands."""

    place: str
    language: str  # "sh" or "python"
    text: str


def codes(path: Path) -> Iterator[Code]:
    """The commands and Python blocks of a document, in order; of inline code, what begins like a command."""
    text = path.read_text()
    for match in re.finditer(
        r"^```(\w*)\n(.*?)^```$|`((?:make|pip|python|resnet-jax) [^`\n]+)`", text, re.MULTILINE | re.DOTALL
    ):
        line = text.count("\n", 0, match.start()) + 1
        if match[3]:
            yield Code(f"{path.name}:{line}", "sh", match[3])
        elif match[1] == "sh":
            start = line + 1
            for logical in re.finditer(r"(?:.*\\\n)*.*\n", match[2]):
                if logical[0].strip():
                    place = start + match[2].count("\n", 0, logical.start())
                    yield Code(f"{path.name}:{place}", "sh", logical[0].replace("\\\n", " "))
        else:
            yield Code(f"{path.name}:{line}", match[1], match[2])


# A network that compiles in a second.
SMALL = ["--config.model.channel_list=(8,8,8)", "--config.model.block_list=(0,0,0)"]

# How the commands run here. Each rule takes the words after those by which it is chosen.


def tiny(argv: Argv, default_workdir: bool = False) -> Argv:
    """The same command with a tiny variant of its config, which trains on digits unless the command names other data."""
    if "--config" not in argv:
        return argv
    i = argv.index("--config") + 1
    source, stem = argv[i].partition(":")[0], Path(argv[i].partition(":")[0]).stem
    variant = {"final": ":smoke", "search": ":smoke", "found": "", "finetune": ""}.get(stem, "")
    replaced = tuple(flag.partition("=")[0] + "=" for flag in SMALL)  # a tuple that is given twice grows
    argv = [*argv[:i], source + variant, *(word for word in argv[i + 1 :] if not word.startswith(replaced)), *SMALL]
    argv = [word.replace("=final-cifar10", "=runs/final") for word in argv]  # a tiny network too
    argv += ["--config.init_from=runs/final"] if stem == "finetune" else []
    argv += ["--config.data.name=digits"] if stem in ("speedrun", "best") else []
    argv += ["--config.data.image_size=16"] if stem in ("best", "resnet50") else []  # Cutout takes 12 pixels
    return [*argv, "--workdir", f"runs/{stem}"] if default_workdir and "--workdir" not in argv else argv


def run_launch(argv: Argv) -> None:
    """Train or evaluate."""
    argv = ["2:2" if argv[i - 1 : i] == ["--profile"] else word for i, word in enumerate(argv)]  # there are 11 steps
    argv = ["2" if argv[i - 1 : i] == ["--extend-to"] else word for i, word in enumerate(argv)]  # there is 1 epoch
    launch.main(tiny(argv, default_workdir=True))


def run_tool(argv: Argv) -> None:
    """Run a tool of the one command."""
    match argv:
        case ["search", "report", *_]:
            command.main(argv)
        case ["search", *rest]:  # the confirmation of the config's own network alone, by one worker
            one = ["--stage=confirm", "--config.search.confirm_seeds=2", "--config.num_epochs=1.0", "--workers=1"]
            command.main(["search", *tiny(rest), *one])
        case ["benchmark", *rest]:
            torch = ("--against-torch", "--torch-python", "--seconds")
            rest = [word for word in rest if not word.startswith(torch)]
            only = [] if any(word.startswith("--only") for word in rest) else ["--only=train_step"]
            command.main(["benchmark", *tiny(rest), *only, "--seconds=0.01", "--repeats=1"])
        case ["serve", *rest]:
            # The samples of the shipped weights are images of CIFAR-10.
            without = ["--no-samples"] if "final-cifar10" in rest and "--no-samples" not in rest else []
            command.main(["serve", *rest, *without, "--port=0"])
        case ["train", *rest]:
            command.main(["train", *tiny(rest, default_workdir="--help" not in rest)])
        case _:
            command.main(tiny(argv))


@functools.cache
def try_make(*argv: str) -> None:
    """Let make print what it would do."""
    subprocess.run(["make", "-n", "-C", ROOT, *argv], check=True, capture_output=True)


def check_make(argv: Argv) -> None:
    """The target exists, and its variables are ones that the Makefile reads."""
    try_make(*argv)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"$({word.partition('=')[0]}" in makefile for word in argv if "=" in word)


def check_pip(argv: Argv) -> None:
    """The extras of this project exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert argv[0] == "install"
    for word in argv[1:]:
        if match := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= extras.keys()
        else:
            assert word in ("-e", ".", "jax[k8s]"), word


def check_file(argv: Argv) -> None:
    """The last word is a file of the repository."""
    assert (ROOT / argv[-1]).is_file()


def check_activate(argv: Argv) -> None:
    """The Makefile makes the virtual environment."""
    assert argv == [".venv/bin/activate"]
    assert "VENV := .venv" in (ROOT / "Makefile").read_text()


def check_pytest(argv: Argv) -> None:
    """The test exists."""
    assert any(f"def {argv[-1]}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def check_installed(argv: Argv) -> None:
    """The program is there."""
    assert shutil.which("tensorboard") or importlib.util.find_spec("tensorboard")
    assert argv == ["--logdir", "runs"]


def run_on_pod(argv: Argv) -> None:
    """What each host of a TPU pod runs."""
    (inner,) = (word.removeprefix("--command=") for word in argv if word.startswith("--command="))
    change, _, rest = inner.partition(" && ")
    assert change.startswith("cd ")
    words = shlex.split(rest)
    assert words[:2] == ["python", "launch.py"]
    assert "--distributed" in words
    run_launch([word for word in words[2:] if word != "--distributed"])


def check_module(module: str) -> Callable[[Argv], None]:
    """A rule for a module that another test runs: it exists, and takes these flags."""

    def check(argv: Argv) -> None:
        spec = importlib.util.find_spec(module)
        assert spec
        source = Path(str(spec.origin)).read_text() + (ROOT / "benchmarks" / "tool.py").read_text()
        flags = [word.partition("=")[0] for word in argv if word.startswith("--") and not word.startswith("--config")]
        assert all(f'"{flag}"' in source for flag in flags)

    return check


RULES: dict[str, Callable[[Argv], None]] = {
    "python launch.py": run_launch,
    "python -m resnet_jax": run_tool,
    "resnet-jax": run_tool,
    "python -m benchmarks.airbench": check_module("benchmarks.airbench"),  # it needs PyTorch and a clone
    "git clone": lambda argv: None,
    "python -m benchmarks.exports": check_module("benchmarks.exports"),  # it needs PyTorch
    "python -m benchmarks.load": check_module("benchmarks.load"),  # test_load.py runs it
    "python -m benchmarks.loop_overhead": check_module("benchmarks.loop_overhead"),  # test_loop_overhead.py runs it
    "python -m benchmarks.disk_stream": check_module("benchmarks.disk_stream"),  # test_disk_stream.py runs it
    "python -m benchmarks.compiled": check_module("benchmarks.compiled"),  # test_compiled.py runs it
    "python -c": lambda argv: exec(argv[0]),
    "python -m reproduction.tables": check_module("reproduction.tables"),
    ".venv/bin/python -m pytest": check_pytest,
    "make": check_make,
    "pip": check_pip,
    "source": check_activate,
    "tensorboard": check_installed,
    "sbatch": check_file,
    "kubectl apply -f": check_file,
    "gcloud compute tpus tpu-vm ssh": run_on_pod,
}


def exit_code(rule: Callable[[Argv], None], argv: Argv) -> int | str:
    """How a rule ends."""
    try:
        rule(argv)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def run_shell(text: str) -> None:
    """Run a command by its rule; variables before it are left out, for they are of the machine."""
    words = shlex.split(text.replace("/shared/", "shared/"), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for beginning, rule in RULES.items():
        first = beginning.split()
        if words[: len(first)] == first:
            code = exit_code(rule, words[len(first) :])
            assert code == 0 or (code == 124 and "--max-seconds" in words), code
            return
    pytest.fail("no rule knows this command")


@pytest.fixture
def folder(tmp_path: Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the files that the documents' user has: images, data sets, files of others."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    rng = np.random.default_rng(0)
    paths = ["cat.png", "photos/a.png", "photos/b.webp", "more/c.jpg"]
    paths += [f"data/birds/{part}/{name}/{i}.png" for part in ("train", "test") for name in "ab" for i in range(20)]
    paths += [f"data/imagenet/{part}/{name}/{i}.png" for part in ("train", "test") for name in "ab" for i in range(20)]
    paths += [f"data/birds-2026/{name}/0.png" for name in "ab"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / path)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 2
    arrays = {"train_images": images[:40], "train_labels": labels[:40], "test_images": images[40:]}
    np.savez(tmp_path / "cifar10.npz", **arrays, test_labels=labels[40:])
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({b"data": images[:3], b"ids": np.arange(3)}, protocol=2))

    class Server:
        def run(self) -> None:
            """Return at once, as after Ctrl-C."""

    opened = studies.opened

    def open_if_local(where: str, create: bool) -> Any:
        if where == "postgresql://USER@HOST/DATABASE":
            raise SystemExit(0)  # all flags are accepted
        return opened(where, create)

    monkeypatch.setattr(waitress, "create_server", lambda *_, sockets, **__: Server())
    monkeypatch.setattr(studies, "opened", open_if_local)
    monkeypatch.setenv("XDG_CACHE_HOME", cache_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a reader of these documents has done before, in README.
BEFORE = {"export.md": "python launch.py --config configs/final.py"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_runs(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name in BEFORE:
        run_shell(BEFORE[path.name])
    names = {"images": np.zeros((2, 8, 8, 3), np.uint8)}
    for code in codes(path):
        environment = dict(os.environ)
        try:
            exec(code.text, names) if code.language == "python" else run_shell(code.text)
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{code.place}: {code.text}") from error
        finally:
            os.environ.clear()
            os.environ.update(environment)


def test_the_documents_name_every_tool() -> None:
    texts = [code.text for path in DOCUMENTS for code in codes(path)]
    assert len(texts) > 40
    for tool in command.TOOLS:
        assert any(re.search(rf"(python -m resnet_jax|resnet-jax) {tool}\b", text) for text in texts), tool
