import subprocess
import sys

import pytest
from conftest import ROOT, assert_user_error, launch

FINAL = f"--config={ROOT}/configs/final.py"
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"

# What is typed -> words of the one line that answers. All of it is found before JAX is imported.
MISTAKES = {
    "no config": ([], ["--config is missing", "--config configs/final.py"]),
    "config without a value": (["--config"], ["Missing value", "--config"]),
    "unknown variant": ([FINAL + ":fast"], ["final.py takes :full or :smoke, not :fast"]),
    "override before the config": (["--config.seed=1", FINAL], ["--config.seed=1", "before", "--config"]),
    "unknown field": ([FINAL, "--config.batchsize=3"], ["batchsize", "did you mean", "batch_size"]),
    "unknown field of a section": ([FINAL, "--config.optim.learningrate=3"], ["learningrate", "learning_rate"]),
    "a number for a section": ([FINAL, "--config.data=3"], ["config.data is not a field"]),
    "text for a whole number": ([FINAL, "--config.batch_size=many"], ["--config.batch_size=many", "int"]),
    "a fraction for a whole number": ([FINAL, "--config.batch_size=1.5"], ["--config.batch_size=1.5", "int"]),
    "true for a whole number": ([FINAL, "--config.batch_size=True"], ["--config.batch_size=True", "int"]),
    "text for a number": ([FINAL, "--config.num_epochs=long"], ["--config.num_epochs=long", "float"]),
    "text in a tuple": (
        [FINAL, "--config.model.block_list=(3,'five',3,0)"],
        ["config.model.block_list is (3, 'five', 3, 0)", "a tuple of one or more whole numbers >= 0"],
    ),
    "a fraction in a tuple": ([FINAL, "--config.model.block_list=(3,5.5,3,0)"], ["config.model.block_list is (3, 5.5"]),
    "an open tuple": ([FINAL, "--config.model.block_list=(3,5"], ["--config.model.block_list=(3,5", "tuple"]),
    "two of three channels": ([FINAL, "--config.data.mean=(0.5,0.5)"], ["config.data.mean is (0.5, 0.5)", "three"]),
    "no number": ([FINAL, "--config.num_epochs=nan"], ["config.num_epochs is nan", "a number > 0"]),
    "no end": ([FINAL, "--config.optim.learning_rate=inf"], ["config.optim.learning_rate is inf", "a number > 0"]),
    "below the range": ([FINAL, "--config.batch_size=-1"], ["config.batch_size is -1", "a whole number from 1 to"]),
    "not a choice": ([FINAL, "--config.model.block=wide"], ["config.model.block is 'wide'", "'basic', 'bottleneck'"]),
    "unequal lists": ([FINAL, "--config.model.block_list=(3,5)"], ["channel_list has 4 entries", "block_list 2"]),
    "warm-up as long as the run": ([FINAL, "--config.num_epochs=5"], ["warmup_epochs is 5.0", "num_epochs 5.0"]),
    "another optimizer's fields": (
        [FINAL, "--config.optim.name=sgd"],
        ["config.optim.momentum is missing", "config.optim.name 'sgd' needs"],
    ),
    "stray argument": ([FINAL, "train"], ["train: stray argument", "--flag=value"]),
    "unknown flag": ([FINAL, "--epochs=3"], ["Unknown command line flag 'epochs'"]),
    "unknown mode": ([FINAL, "--mode=test"], ["--mode=test", "train|eval"]),
    "workdir without a value": ([FINAL, "--workdir"], ["Missing value", "--workdir"]),
}

# A config file's text -> words of the one line.
CONFIG_FILES = {
    "syntax error": ("def get_config(:\n", ["invalid syntax", "config.py"]),
    "failing import": ("import no_such_module\n", ["no_such_module"]),
    "failing call": ("def get_config():\n    return 1 / 0\n", ["division by zero"]),
    "no get_config": ("config = 3\n", ["get_config"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_and_leaves_no_file(here, mistake):
    arguments, words = MISTAKES[mistake]
    assert_user_error(launch(*arguments), *words)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("mistake", CONFIG_FILES)
def test_a_config_file_that_fails_is_one_line_and_leaves_no_file(here, tmp_path, mistake):
    text, words = CONFIG_FILES[mistake]
    (tmp_path / "config.py").write_text(text)
    assert_user_error(launch("--config", tmp_path / "config.py"), *words)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--workdir=nowhere"], ["--workdir=nowhere", "--checkpoint=newest"]])
def test_evaluating_without_a_run_is_one_line_and_leaves_no_file(here, arguments):
    directory = "nowhere" if arguments else "runs/quickstart"
    assert_user_error(launch(QUICKSTART, "--mode=eval", *arguments), f"{here / directory} holds no run", "--workdir")
    assert list(here.iterdir()) == []


def test_a_workdir_that_is_a_file_is_one_line_and_stays_as_it_was(here):
    (here / "file").write_text("mine")
    for directory in ("file", "file/run"):
        assert_user_error(launch(QUICKSTART, "--workdir", directory), f"--workdir {here / directory}", "choose another")
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("file", "mine")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=63", ["config.batch_size 63", "2 devices", "62 or 64"]),
        ("model.max_params=1000", ["the model has 78,042 parameters of 1,000 allowed", "config.model.max_params"]),
        ("data.name=cifarr10", ["config.data.name 'cifarr10'", "such as cifar10, or digits, npz:FILE or folder:DIR"]),
        ("data.name=npz:none.npz", ["none.npz is not a file", "npz:FILE"]),
    ],
)
def test_what_only_data_and_devices_show_is_one_line_and_leaves_no_file(here, override, words):
    assert_user_error(launch(QUICKSTART, "--workdir=run", f"--config.{override}"), *words)
    assert list(here.iterdir()) == []


def test_help_lists_the_flags_and_starts_nothing(here):
    done = launch("--help")
    assert done.returncode in (0, 1)  # absl's is 1
    assert done.stderr == ""
    for flag in ("--config:", "--workdir:", "--mode: <train|eval>", "--checkpoint:", "--[no]distributed:"):
        assert flag in done.stdout
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [[FINAL], [FINAL + ":smoke", "--config.batch_size=8"], [QUICKSTART]])
def test_flags_and_config_are_checked_before_jax_or_tensorflow_is_imported(arguments):
    program = (
        "import sys, launch; launch.cli._parse_flags(sys.argv)\n"
        "print(launch.cli.CONFIG.value.batch_size, sorted({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    expected = {FINAL: 128, FINAL + ":smoke": 8, QUICKSTART: 64}[arguments[0]]
    assert (done.returncode, done.stdout) == (0, f"{expected} []\n"), done.stderr
