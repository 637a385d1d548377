"""What `environment.json` says of the machine."""

import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from resnet_jax.runs import environment


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Run git in a new repository that holds the package, with one commit."""

    def run(*arguments):
        as_somebody = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *as_somebody, *arguments], cwd=tmp_path, check=True, capture_output=True)

    run("init")
    for name in ("resnet_jax/steps.py", "results/final.json", "docs/usage.md", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("__pycache__/\n")
    run("add", ".")
    run("commit", "--message=a")
    monkeypatch.setattr(environment.host, "CHECKOUT", tmp_path)
    return run


def test_the_processor_is_named_with_what_a_clouds_name_hides(monkeypatch):
    text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx avx2\n\nprocessor\t: 1\n"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, *_: text)
    assert environment._cpu() == "AMD EPYC (family 25, model 1, AVX2)"
    monkeypatch.setattr(Path, "read_text", lambda path, *_: text.replace("avx2", "avx2 avx512f"))
    assert environment._cpu() == "AMD EPYC (family 25, model 1, AVX-512)"


def test_without_proc_the_system_says_which_processor(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(environment.platform, "processor", lambda: "arm")
    assert environment._cpu() == "arm"


def test_the_commit_is_that_of_the_repository_that_holds_the_package(git, tmp_path, monkeypatch):
    assert environment._git_state() is not None
    (tmp_path / "vendored" / "resnet_jax").mkdir(parents=True)
    monkeypatch.setattr(environment.host, "CHECKOUT", tmp_path / "vendored")
    assert environment._git_state() is None


def test_results_data_and_documents_do_not_make_the_code_of_a_run_dirty(git, tmp_path):
    for name in (
        *("results/final.json", "results/step-h100.json", "cifar10.npz", "runs/final/result.json", "report/index.html"),
        *("docs/usage.md", "tests/test_new.py", "resnet_jax/__pycache__/steps.pyc"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("changed or new")
    assert environment._git_state()["dirty"] is False


@pytest.mark.parametrize(
    "name",
    [
        *("resnet_jax/steps.py", "resnet_jax/kernels/new.cc", "configs/mine.py", "benchmarks/new.py", "launch.py"),
        *("reproduction/reproduce.py", "setup.py", "pyproject.toml", "requirements.txt"),
    ],
)
def test_code_that_is_changed_or_not_in_the_commit_is_dirty(git, tmp_path, name):
    git("config", "status.showUntrackedFiles", "no")  # a user's setting
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("changed or new")
    assert environment._git_state()["dirty"] is True


def test_deleted_code_is_dirty(git, tmp_path):
    (tmp_path / "resnet_jax" / "steps.py").unlink()
    assert environment._git_state()["dirty"] is True


def test_all_code_of_the_repository_counts():
    """A new folder of code is named in `_CODE`, or here."""
    assert all((ROOT / name).exists() for name in environment._CODE)
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {".ci", "build", "tests"}
    assert folders | {path.name for path in ROOT.glob("*.py")} <= set(environment._CODE)


def test_what_changes_the_rounding_of_a_run_is_named():
    before = environment.collect()
    assert environment.changes(before, before | {"host": "another", "python": "3.99"}) == []
    now = before | {"cpu_count": 99, "xla_flags": "--xla_cpu_enable_fast_math=true"}
    now["versions"] = before["versions"] | {"jaxlib": "0.1", "numpy": "0.1"}
    assert environment.changes(before, now) == [
        f"cpu_count {before['cpu_count']} -> 99",
        f"xla_flags {before['xla_flags']} -> --xla_cpu_enable_fast_math=true",
        f"jaxlib {before['versions']['jaxlib']} -> 0.1",
    ]


@pytest.mark.parametrize(
    "name", ["cpu", "cpu_count", "backend", "devices", "processes", "xla_flags", "native_kernels", "jax", "jaxlib"]
)
def test_each_of_what_changes_the_rounding_of_a_run_is_compared(name):
    before = environment.collect()
    old = before[name] if name in before else before["versions"][name]
    changed = {name: "another"} if name in before else {"versions": before["versions"] | {name: "another"}}
    assert environment.changes(before, before | changed) == [f"{name} {old} -> another"]


def test_convolutions_that_are_not_the_compiled_ones_are_named(monkeypatch):
    before = environment.collect()
    monkeypatch.setenv("RESNET_JAX_NATIVE", "0")
    environment.native.unavailable.cache_clear()
    now = environment.collect()
    environment.native.unavailable.cache_clear()
    if before["native_kernels"]:
        assert environment.changes(before, now) == ["native_kernels True -> False"]
    without = {name: value for name, value in before.items() if name != "native_kernels"}  # as older versions wrote it
    assert environment.changes(without, now) == []
