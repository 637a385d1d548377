"""What `environment.json` says of the machine."""

import subprocess
from pathlib import Path

from resnet_jax.runs import environment


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


def test_the_commit_is_that_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    def git(*arguments):
        as_somebody = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *as_somebody, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "--message=other code")
    for root, known in ((tmp_path, True), (tmp_path / "vendored", False)):
        (root / "resnet_jax").mkdir(parents=True)
        monkeypatch.setattr(environment.host, "CHECKOUT", root)
        assert (environment._git_state() is not None) == known


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
