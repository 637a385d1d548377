"""The one command: its tools, how they answer mistakes, where they take a config from."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, assert_user_error, launch, make_tiny_config, mistake_of_tool, rows, tool
from PIL import Image

from configs import final
from resnet_jax import config
from resnet_jax.cli import command_line
from resnet_jax.cli.tools import TOOLS
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config
from resnet_jax.runs.preemption import TrainingInterrupted

COMMAND = ("-m", "resnet_jax")
TAKE_A_CONFIG = ("train", "weights load", "search", "benchmark")


def run_in(folder, *command, **environment):
    """Run Python in a folder."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# Help and mistakes


def test_outside_the_environment_a_missing_package_is_one_line(tmp_path):
    done = run_in(tmp_path, "-S", "-m", "resnet_jax", "--help", PYTHONPATH=str(ROOT))  # -S: without site-packages
    assert_user_error(done, "absl is not installed", "source .venv/bin/activate")


COMMANDS = {
    "training": ("launch.py", "--config=configs/final.py:smoke", "--workdir={}/run"),
    "a benchmark": ("-m", "resnet_jax", "benchmark", "--config=configs/final.py:smoke", "--output={}/benchmark.json"),
    "reproduce": ("-m", "reproduction.reproduce", "step", "--data=digits", "--results={}/results"),
    "report": ("-m", "reproduction.report", "run", "--output={}/report"),
}


@pytest.mark.parametrize("package", ["clu", "ml_collections"])
@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_package_every_command_is_one_line_that_names_it(tmp_path, command, package):
    (tmp_path / package).mkdir()
    message = f"No module named {package!r}"
    (tmp_path / package / "__init__.py").write_text(f"raise ModuleNotFoundError({message!r}, name={package!r})")
    arguments = [argument.format(tmp_path) for argument in COMMANDS[command]]
    done = run_in(ROOT, *arguments, PYTHONPATH=f"{tmp_path}:{ROOT}", JAX_PLATFORMS="cpu")
    assert_user_error(done, package, "install")
    assert [path.name for path in tmp_path.iterdir()] == [package]  # nothing was written


def test_clu_is_behind_one_module():
    """It is no longer maintained: what replaces it changes one file."""
    uses = [path for path in (ROOT / "resnet_jax").rglob("*.py") if re.search(r"(from|import) clu\b", path.read_text())]
    assert uses == [ROOT / "resnet_jax" / "train_state.py"]


def test_a_reader_that_closes_the_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "resnet_jax", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writer)
    assert done.stderr == b""


def test_a_config_file_may_have_dataclasses_and_read_files_beside_it(tmp_path):
    """As any module can; it is loaded without functions that Python no longer has."""
    lines = ["from __future__ import annotations", "import dataclasses", "from pathlib import Path"]
    lines += ["from configs import quickstart", "@dataclasses.dataclass", "class Size:", "    batch: int"]
    lines += ["def get_config(variant='0'):", "    config = quickstart.get_config()"]
    lines += ["    config.batch_size = Size(int(Path(__file__).with_name('size').read_text())).batch + int(variant)"]
    lines += ["    return config"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    (tmp_path / "size").write_text("24")
    for variant, size in (("", 24), (":8", 32)):
        loaded = command_line.load_config(f"{tmp_path / 'mine.py'}{variant}", ["--config.seed=7"])
        assert (loaded.batch_size, loaded.seed, loaded.is_locked) == (size, 7, True)


def test_a_config_without_variants_says_so():
    with pytest.raises(UserError, match="this config has no variants"):
        command_line.load_config("quickstart:smoke")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["weights", "--help"]])
def test_the_command_lists_its_tools(arguments, capsys):
    tool(*arguments)
    printed = capsys.readouterr().out
    for name, (_, summary) in TOOLS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", printed, re.MULTILINE)


@pytest.mark.parametrize("name", TOOLS)
def test_help_documents_every_flag_of_a_tool(name, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(*name.split(), "--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m resnet_jax {name} [-h]" in printed
    assert f"python -m resnet_jax {name} " in printed.partition("\n\n")[2]  # an example
    flags = re.findall(r"^  (--[\w.-]+(?: \S+)?)(  +\S.*|\n +\S.*)?$", printed, re.MULTILINE)
    assert flags
    assert all(text.strip() for _, text in flags), flags
    assert ("--config CONFIG" in printed) == (name in TAKE_A_CONFIG)


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("arguments", [["run", "--no-such-flag=1"], ["run", "--checkpoint"], ["run", "--outpu=x"]])
def test_a_mistake_in_the_flags_of_a_tool_is_one_line(name, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(*name.split(), *arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f": see python -m resnet_jax {name} --help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "there is no tool 'trian': did you mean train?"),
        (["weights"], "there is no tool 'weights': did you mean weights load or weights save?"),
        (["weights", "swap"], "there is no tool 'weights swap': did you mean weights load or weights save?"),
        (["x"], "there is no tool 'x': give one of train, eval"),
        (["search", "reprot", "--study=a"], "there is no tool 'search reprot': did you mean search report?"),
        (["train", "final"], "unrecognized arguments: final: did you mean --config final? See"),
        (["train", "--config", "finl"], "--config finl is not a file: did you mean final? Give a config file"),
    ],
)
def test_an_unknown_tool_is_one_line(arguments, words, capsys):
    line = mistake_of_tool(capsys, *arguments)
    assert words in line


def test_help_imports_neither_jax_nor_tensorflow(tmp_path):
    program = (
        "import sys; from resnet_jax.cli.tools import TOOLS, main\n"
        "for name in TOOLS:\n"
        "    try: main([*name.split(), '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "    print(f'{name}:', sorted({'jax', 'flax', 'optuna', 'tensorflow'} & set(sys.modules)))"
    )
    done = run_in(tmp_path, "-c", program, PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in TOOLS:
        assert f"{name}: []" in lines


def test_a_config_is_checked_before_jax_or_tensorflow_is_imported():
    program = (
        "import sys; from resnet_jax.cli.command_line import load_config\n"
        "print(load_config(sys.argv[1], sys.argv[2:]).batch_size, sorted({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
    )
    done = run_in(ROOT, "-c", program, "final:smoke", "--config.batch_size=8")
    assert (done.returncode, done.stdout) == (0, "8 []\n"), done.stderr


@pytest.mark.parametrize(
    ("module", "instead"),
    [
        *((name, name) for name in ("train", "predict", "export", "report", "benchmark", "search")),
        *(("demo", "serve"), ("model_card", "card"), ("torch_weights", "weights"), ("steps", "--help")),
        ("inference.predict", "predict"),
    ],
)
def test_an_old_spelling_says_what_to_type(module, instead):
    done = launch("runs/x", "--flag=1", program=("-m", f"resnet_jax.{module}"))
    assert_user_error(done, f"python -m resnet_jax.{module} is not a command: run python -m resnet_jax {instead}")
    assert done.stderr.endswith(f" {instead}\n")


# Where a config comes from


def test_a_config_is_a_file_a_shipped_name_or_the_config_json_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = command_line.load_config("final:smoke")
    assert by_name == command_line.load_config(f"{ROOT}/configs/final.py:smoke")
    Path("config.json").write_text(json.dumps(stored_config.to_json(by_name)))
    from_json = command_line.load_config("config.json", ["--config.model.block_list=(2,1)", "--config.seed=3"])
    expected = config.replaced(by_name, {"model.block_list": (2, 1), "seed": 3})
    assert from_json.to_dict() == expected.to_dict()
    assert from_json.is_locked
    with pytest.raises(UserError, match=r"--config config.json:full: a config.json has no variants: leave out :full"):
        command_line.load_config("config.json:full")


def test_a_colon_in_the_path_of_a_config(tmp_path):
    run = tmp_path / "12:30"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(stored_config.to_json(final.get_config())))
    assert command_line.load_config(run / "config.json").to_dict() == final.get_config().to_dict()
    assert command_line.default_workdir(str(run / "config.json")) == run
    (run / "mine.py").touch()
    assert command_line.config_file(f"{run}/mine.py:small") == (run / "mine.py", ":small")


def test_a_whole_number_can_stand_for_a_float(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import final\n\ndef get_config():\n    config = final.get_config()\n"
        "    del config.label_smoothing, config.num_epochs\n    config.label_smoothing, config.num_epochs = 0, 50\n"
        "    return config\n"
    )
    from_file = command_line.load_config(tmp_path / "mine.py", ["--config.label_smoothing=0.25"])
    assert (from_file.label_smoothing, from_file.num_epochs) == (0.25, 50.0)
    (tmp_path / "config.json").write_text(json.dumps(stored_config.to_json(from_file) | {"num_epochs": 50}))
    from_json = command_line.load_config(tmp_path / "config.json", ["--config.num_epochs=60.5"])
    assert stored_config.extended(from_json, 70.5).num_epochs == 70.5


def test_a_file_wins_over_the_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "final").mkdir()
    assert command_line.load_config("final").seed == 0
    (tmp_path / "final").rmdir()
    text = "from configs import final\ndef get_config():\n    c = final.get_config()\n    c.seed = 7\n    return c\n"
    Path("final").write_text(text)
    assert command_line.load_config("final").seed == 7


@pytest.mark.parametrize(
    ("source", "workdir"),
    [
        ("final", "runs/final"),
        ("final:smoke", "runs/final-smoke"),
        ("configs/final.py", "runs/final"),
        ("configs/final.py:full", "runs/final-full"),
        ("a:b/config.json", None),
    ],
)
def test_the_default_workdir(source, workdir, monkeypatch):
    monkeypatch.chdir(ROOT)
    if workdir:
        assert command_line.default_workdir(source) == Path(workdir)
    else:
        with pytest.raises(UserError, match="--config a is not a file"):
            command_line.default_workdir(source)


BROKEN_JSON = {
    "no JSON": ("{", "config.json cannot be used"),
    "a list": ("[]", "config.json cannot be used"),
    "a field less": ('{"seed": 0}', "config.batch_size is missing"),
}


@pytest.mark.parametrize("damage", BROKEN_JSON)
def test_a_config_json_that_cannot_be_used_is_named(tmp_path, damage):
    text, words = BROKEN_JSON[damage]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        command_line.load_config(tmp_path / "config.json")


# The tool eval


def test_eval_takes_the_config_of_the_run(run, capsys):
    tool("eval", run, "--config.eval_batch_size=64", "--checkpoint=latest")
    assert "checkpoint latest, step 41" in capsys.readouterr().out
    report = json.loads((run / "eval.json").read_text())
    assert report["validation"]["accuracy"] == rows(run, "validation")[-1]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.seed=1"], "--config.seed changes the result: leave it out"),
        (["--config.sed=1"], "did you mean config.seed?"),
        (["--checkpoint=7"], "no checkpoint of step 7"),
        (["--config=final"], "unrecognized arguments: --config=final"),
    ],
)
def test_a_mistake_of_eval_is_one_line(run, arguments, words, capsys):
    line = mistake_of_tool(capsys, "eval", run, *arguments)
    assert words in line


def test_eval_of_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool("eval", tmp_path)
    assert capsys.readouterr().err == f"error: {tmp_path} holds no run: give the workdir of a run\n"


def test_the_config_json_of_a_run_names_the_run(run, capsys):
    tool("train", "--config", run / "config.json")
    assert f"{run} is complete" in capsys.readouterr().out


# From Python


def test_train_is_the_function_whatever_was_imported_before(tmp_path, cache_dir):
    import resnet_jax.training
    from resnet_jax import train

    assert train is resnet_jax.train
    tiny = make_tiny_config(cache_dir)
    with pytest.raises(UserError, match=r"config\.batch_size is 0"):
        train(config.replaced(tiny, {"batch_size": 0}), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(TrainingInterrupted):
        train(tiny, str(tmp_path / "run"), max_seconds=0)
    assert train(tiny, str(tmp_path / "run")).steps == 41
    assert repr(resnet_jax.load(tmp_path / "run")) == "Model(5,266 parameters, 10 classes, 8x8 images, step 41)"


def test_train_leaves_the_process_to_its_caller(tmp_path, cache_dir, monkeypatch):
    import resnet_jax.training

    stop_requests = []
    monkeypatch.setattr(resnet_jax.training, "train", lambda *_, stop_request, **__: stop_requests.append(stop_request))
    resnet_jax.train(make_tiny_config(cache_dir), tmp_path / "run")
    (stop_request,) = stop_requests
    assert not stop_request._ends_process


def test_importing_the_package_imports_no_jax(tmp_path):
    program = "import sys; from resnet_jax import train; print(callable(train), 'jax' in sys.modules)"
    assert run_in(tmp_path, "-c", program, PYTHONPATH=ROOT).stdout == "True False\n"


def test_a_path_that_a_shell_leaves_alone_is_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert command_line.local_path("~/page") == Path("/home/someone/page")
    assert command_line.local_path("page/~") == Path("page/~")


# Outside a checkout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel installs, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("resnet_jax", "configs", "weights", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = run_in(folder, "-m", "pip", "wheel", source, *flags, "--wheel-dir", folder, CFLAGS="-O0")  # soon compiled
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package_the_configs_and_the_weights(installed):
    expected = {path.relative_to(ROOT) for path in (ROOT / "resnet_jax").rglob("*") if path.is_file()}
    expected |= {Path("resnet_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py")}
    expected |= {Path("resnet_jax") / path.relative_to(ROOT) for path in (ROOT / "weights").iterdir()}
    expected = {path for path in expected if "__pycache__" not in path.parts}
    this_python = sysconfig.get_config_var("EXT_SUFFIX")  # a checkout may hold what other Pythons compiled
    expected = {path for path in expected if path.suffix != ".so" or path.name.endswith(this_python)}
    found = {path.relative_to(installed) for path in (installed / "resnet_jax").rglob("*") if path.is_file()}
    assert found == expected
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "resnet-jax = resnet_jax.cli.tools:run" in entry_points.read_text()


def test_what_a_wheel_installs_trains_and_evaluates_outside_a_checkout(installed, tmp_path):
    command = ("-c", "from resnet_jax.cli.tools import run; run()")  # as the script resnet-jax does
    environment = {"PYTHONPATH": str(installed)}
    done = run_in(tmp_path, *command, "train", "--config", "final:smoke", **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "runs" / "final-smoke" / "result.json").exists()
    done = run_in(tmp_path, *command, "eval", "runs/final-smoke", **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    own = tmp_path / "own.py"
    own.write_text("from configs import sgd\ndef get_config():\n    return sgd.get_config()\n")
    program = "import resnet_jax, sys; from resnet_jax.cli.command_line import load_config as load\nfor source in sys.argv[1:]: print(load(source).optim.name, resnet_jax.__file__)"
    done = run_in(tmp_path, "-c", program, "sgd", own, **environment)
    assert done.stdout == f"sgd {installed}/resnet_jax/__init__.py\n" * 2, done.stderr
    assert_user_error(run_in(tmp_path, *command, "benchmark", **environment), "benchmark needs a checkout")


def test_a_config_file_imports_its_neighbours_first_in_a_folder_called_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text(
        "from configs import final\ndef get_config():\n    c = final.get_config()\n    c.seed = 5\n    return c\n"
    )
    (tmp_path / "configs" / "mine.py").write_text("from configs import base\nget_config = base.get_config\n")
    program = (
        "import sys; from resnet_jax.cli.command_line import load_config; print(load_config('configs/mine.py').seed)"
    )
    assert run_in(tmp_path, "-c", program, PYTHONPATH=ROOT).stdout == "5\n"


def test_a_tool_whose_output_nobody_reads_any_more_ends_without_a_traceback():
    program = "import sys; from resnet_jax.cli import command_line; command_line.run(lambda argv: setattr(sys, 'stdout', None))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_limit_of_the_address_space_under_which_libraries_crash_is_refused():
    limited = ("sh", "-c", 'ulimit -v 3000000; exec "$@"', "sh")
    done = launch("predict", "final-cifar10", "a.png", program=COMMAND, prefix=limited)
    assert_user_error(done, "may address only 3.1 GB of memory", "need 4 GB: raise the limit, with ulimit -v")


def test_an_ascii_locale_changes_neither_pages_nor_names(run, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    Image.new("RGB", (8, 8)).save(tmp_path / "Käse.png")
    network = tmp_path / "Käse.safetensors"
    tool("export", run, "--format", "safetensors", "--output", network)
    for arguments in (("eval", run), ("card", run), ("report", run, "--output", tmp_path / "page")):
        done = launch(*arguments, program=COMMAND, **ascii_only)
        assert done.returncode == 0, done.stderr
    assert "±" in (tmp_path / "page" / "index.html").read_text("utf-8")
    done = launch("predict", network, tmp_path, program=COMMAND, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/K\\udcc3\\udca4se.png")
