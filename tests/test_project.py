"""The files that surround the code: each parses, points at what is there, and agrees with the others."""

import copy
import datetime
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from helpers import ROOT

import resnet_jax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = resnet_jax.__version__
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
PYTHONS = {"3.11", "3.12", "3.13"}


def load_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


def make_prints(*arguments, **environment):
    """What `make -n` would run, with no other Python on the path than those of `environment`."""
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def released():
    """The versions of the changelog with their dates, newest first."""
    return re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_newest_version_of_the_changelog_is_that_of_the_package():
    versions = released()
    assert versions[0][0] == VERSION
    assert versions == sorted(versions, key=lambda entry: tuple(map(int, entry[0].split("."))), reverse=True)


def test_the_changelog_groups_its_entries_as_keep_a_changelog_does():
    text = (ROOT / "CHANGELOG.md").read_text()
    groups = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert groups
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert text.index("## [Unreleased]") < text.index(f"## [{VERSION}]")


def test_the_citation_has_the_keys_that_its_format_requires_and_is_of_this_version():
    citation = load_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    for author in citation["authors"]:
        assert author.keys() & {"name", "family-names", "given-names", "alias"}
    for reference in citation["references"]:
        assert {"authors", "title", "type"} <= reference.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    version, date = released()[0]
    assert (str(citation["version"]), citation["date-released"]) == (version, datetime.date.fromisoformat(date))


def test_ruff_has_one_pin():
    (hook,) = [repo for repo in load_yaml(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    assert {entry["id"] for entry in hook["hooks"]} == {"ruff-check", "ruff-format"}
    (in_extra,) = re.findall(r"ruff==(\S+)", " ".join(PROJECT["project"]["optional-dependencies"]["test"]))
    (in_requirements,) = re.findall(r"^ruff==(\S+)", REQUIREMENTS, re.MULTILINE)
    assert hook["rev"].removeprefix("v") == in_extra == in_requirements


@pytest.fixture(scope="module")
def dependencies():
    """The check of `make lint`."""
    spec = importlib.util.spec_from_file_location("check_dependencies", ROOT / ".ci" / "check_dependencies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_imported_is_declared_and_what_is_declared_is_pinned_by_hash(dependencies):
    project = PROJECT["project"]
    assert [*dependencies.undeclared(ROOT, project), *dependencies.outdated(REQUIREMENTS, project)] == []
    assert ".ci/check_dependencies.py" in make_prints("lint", "PYTHON=python3")


def test_a_dependency_that_is_not_declared_or_not_pinned_is_found(dependencies):
    project = copy.deepcopy(PROJECT["project"])
    project["dependencies"].remove("sqlalchemy>=2.0")
    (line,) = dependencies.undeclared(ROOT, project)
    assert line == "resnet_jax/search/studies.py imports sqlalchemy: add sqlalchemy to pyproject.toml"
    project["dependencies"] += ["sqlalchemy>=99", "numpy-of-another-name ; python_version < '3.12'"]
    lines = set(dependencies.outdated(REQUIREMENTS, project))
    assert (
        'requirements.txt has nothing for numpy-of-another-name; python_version < "3.12" on Python 3.11, linux x86_64'
        in lines
    )
    assert sum("for sqlalchemy>=99 on Python 3.13, darwin arm64" in line for line in lines) == 1
    assert len(lines) == 3 + 9
    for damage in (
        re.sub(r"^ruff==.*\n(    --hash.*\n)+", "ruff==0.17.6\n", REQUIREMENTS, flags=re.MULTILINE),
        "--index-url https://example.org/simple\n" + REQUIREMENTS,
    ):
        assert any(
            "each line must be a pin with hashes" in line for line in dependencies.outdated(damage, PROJECT["project"])
        )


def test_the_licence_of_each_dependency_is_documented():
    text = (ROOT / "docs" / "architecture.md").read_text()
    documented = dict(re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \|", text.partition("## Dependencies")[2], re.MULTILINE))
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    assert documented.keys() == {re.match(r"[\w.-]+", entry)[0] for group in groups for entry in group}


def test_the_workflow_runs_the_check_on_every_supported_python():
    workflow = load_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    assert set(job["strategy"]["matrix"]["python-version"]) == PYTHONS
    assert job["env"]["PYTHON"] == "python"
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as true


def dockerfile():
    """(instruction, arguments) of the Dockerfile: a list where they are JSON or paths, otherwise the text."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    steps = [line.split(maxsplit=1) for line in lines.splitlines() if line]
    return [
        (name, json.loads(rest) if rest.startswith("[") else rest.split() if name == "COPY" else rest)
        for name, rest in steps
    ]


def test_the_dockerfile_copies_what_is_there_and_what_dockerignore_lets_through():
    copied = [path for name, paths in dockerfile() if name == "COPY" for path in paths[:-1]]
    assert {"requirements.txt", "pyproject.toml", "resnet_jax"} <= set(copied)
    ignored, *excepted = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "**/"))
    ]
    assert ignored == "*"
    assert {f"!{path}" for path in copied} == set(excepted)
    assert all((ROOT / path).exists() for path in copied)
    packaged = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    assert set(packaged) <= set(copied)  # setuptools reads them


def test_the_dockerfile_starts_the_command_as_a_user_that_is_not_root():
    steps = dockerfile()
    assert {name for name, _ in steps} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    name, image = steps[0]
    assert name == "FROM"
    assert re.fullmatch(r"python:(3\.\d+)-slim", image)[1] in PYTHONS
    last = dict(steps)
    assert last["USER"] != "root"
    assert [name for name, _ in steps].index("USER") > max(i for i, (name, _) in enumerate(steps) if name == "RUN")
    assert last["ENTRYPOINT"][0] in PROJECT["project"]["scripts"]


def test_the_dockerfile_installs_what_make_installs():
    installed = re.findall(r"pip (install .+)", make_prints("--always-make", ".venv/installed", "PYTHON=python3"))
    runs = [command.removeprefix("python -m pip ") for name, command in dockerfile() if name == "RUN"]
    assert len(installed) == 2
    assert all(any(run.startswith(command) for run in runs) for command in installed)
    copied = {path for name, command in dockerfile() if name == "COPY" for path in command[:-1]}
    folders = {
        "resnet_jax",
        *PROJECT["tool"]["setuptools"]["package-dir"].values(),
    }  # those that the package is made of
    assert folders <= copied


def test_make_takes_the_newest_python_that_works(tmp_path):
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        code = 127 if name == "python3.13" else 0  # it is there and fails, as one of pyenv may
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    printed = subprocess.run(
        [shutil.which("make"), "-n", "--always-make", ".venv/installed"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "python3.12 -m venv .venv" in printed


def test_make_says_what_to_expect_before_it_starts():
    lines = make_prints("--always-make", "run", "PYTHON=python3").splitlines()
    minutes = next(i for i, line in enumerate(lines) if line.startswith("echo") and "minutes" in line)
    training = next(i for i, line in enumerate(lines) if line.startswith("echo") and "Training" in line)
    assert minutes < next(i for i, line in enumerate(lines) if "-m venv" in line)
    assert training < next(i for i, line in enumerate(lines) if "quickstart" in line and not line.startswith("echo"))
    assert not any("--quiet" in line for line in lines)


def test_the_wheel_says_that_the_package_is_typed():
    assert (ROOT / "resnet_jax" / "py.typed").read_text() == ""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["resnet_jax"]
    assert any(fnmatch.fnmatch("py.typed", pattern) for pattern in patterns)


def test_contributing_points_at_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:resnet_jax|configs|tests|docs)/[\w/.]*)`|(tests/\w+\.py)", text)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / "".join(path)).exists(), path
    targets = set(re.findall(r"^    make (\S+)", text, re.MULTILINE))
    assert len(targets) == 3
    make_prints(*sorted(targets), "PYTHON=python3")
    sources = "".join(path.read_text() for path in (ROOT / "resnet_jax").rglob("*.py"))
    names = set(re.findall(r"`([A-Z][A-Z_]+|[A-Z]\w+[a-z]\w*|test_\w+)`", text)) - {"TFDS_DATA_DIR"}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert len(names) > 8
    assert all(re.search(rf"\b{name}\b", sources + tests) for name in names)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the kernel, which starts where a user's notebook may be: anywhere
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    result = json.loads((tmp_path / "runs" / "notebook" / "result.json").read_text())
    assert result["test_accuracy"] > 0.9
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any(f"{result['test_accuracy']:.1%}" in output.get("text", "") for output in outputs)


def test_the_notebook_is_valid_and_holds_no_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "find_spec" in code[0].source
    assert "pip install" in code[0].source
