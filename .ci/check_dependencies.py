"""Check that what the code imports is declared in pyproject.toml, and that requirements.txt pins what is declared, by hash."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OPTIONAL = {"torch"}  # imported only where a user has it
PIN = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; ([^\\\n]+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+)")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


def declared(project: dict) -> dict[str, list[Requirement]]:
    """Return the dependencies that pyproject.toml declares: by extra, and as "" those of the package."""
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the first name of each absolute import of the Python files in a folder, with the file."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0], path


def undeclared(root: Path, project: dict) -> Iterator[str]:
    """Yield a line for each import of a package that is installed and not declared: for the package's code, without "test"."""
    by_extra, packages = declared(project), importlib.metadata.packages_distributions()
    for folders, extras in (
        (("resnet_jax", "configs"), by_extra.keys() - {"test"}),
        (("benchmarks", "reproduction", "tests"), by_extra.keys()),
    ):
        names = {canonicalize_name(entry.name) for extra in extras for entry in by_extra[extra]}
        names.add(canonicalize_name(project["name"]))
        for folder in folders:
            for module, path in imported(root / folder):
                providers = {canonicalize_name(name) for name in packages.get(module, [])}
                if providers and not providers & names and module not in OPTIONAL | sys.stdlib_module_names:
                    yield f"{path.relative_to(root)} imports {module}: add {' or '.join(providers)} to pyproject.toml"


def outdated(requirements: str, project: dict) -> Iterator[str]:
    """Yield a line for each dependency that requirements.txt does not pin, on a supported Python and system, by hash."""
    rest = PIN.sub("", requirements)
    if rest:
        yield f"requirements.txt: each line must be a pin with hashes, got {rest.splitlines()[0]!r}"
    pins = [
        Requirement(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
        for name, version, marker, _ in PIN.findall(requirements)
    ]
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())
    for minor in range(low, high):
        for system, machine in SYSTEMS:
            where = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "sys_platform": system}
            where |= {"platform_machine": machine, "implementation_name": "cpython"}
            here = {canonicalize_name(p.name): p for p in pins if not p.marker or p.marker.evaluate(where)}
            for entry in (entry for extra in ("", "tfds", "test") for entry in declared(project)[extra]):
                if entry.marker and not entry.marker.evaluate(where):
                    continue
                pin = here.get(canonicalize_name(entry.name))
                version = str(pin.specifier).removeprefix("==") if pin else "nothing"
                if not pin or not entry.specifier.contains(version):
                    yield f"requirements.txt has {version} for {entry} on Python 3.{minor}, {system} {machine}"


def main() -> None:
    """Print what is wrong, and exit with 1 if something is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wrong = [*undeclared(ROOT, project), *outdated((ROOT / "requirements.txt").read_text("utf-8"), project)]
    if wrong:
        sys.exit("\n".join([*dict.fromkeys(wrong), "see 'Change the pinned versions' in CONTRIBUTING.md"]))


if __name__ == "__main__":
    main()
