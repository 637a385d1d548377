import atexit
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_user_error, launch, launch_here, mistake_of_tool
from PIL import Image

FINAL = f"--config={ROOT}/configs/final.py"
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"

SMOKE = [f"--config={ROOT}/configs/final.py:smoke"]

# What is typed -> words of the one line that answers.
MISTAKES = {
    "no config": ([], ["--config is missing", "--config configs/final.py"]),
    "two configs": ([FINAL, QUICKSTART], ["--config is given 2 times", "once"]),
    "config without a value": (["--config"], ["--config", "expected one argument"]),
    "unknown variant": ([FINAL + ":fast"], ["final.py takes :full or :smoke, not :fast"]),
    "override without a config": (["--config.seed=1"], ["--config is missing"]),
    "override without a value": ([FINAL, "--config.seed"], ["--config.seed has no value", "--config.seed=VALUE"]),
    "a config that is not there": (
        ["--config=configs/none.py"],
        ["configs/none.py is not a file", "final, finetune, found_cpu"],
    ),
    "a config of no name": (
        ["--config=finale"],
        ["--config finale is not a file: did you mean final?", "or one of best, final"],
    ),
    "a shipped config's unknown variant": (["--config=final:fast"], ["final.py takes :full or :smoke, not :fast"]),
    "unknown field": ([FINAL, "--config.batchsize=3"], ["batchsize", "did you mean", "batch_size"]),
    "unknown field of a section": ([FINAL, "--config.optim.learningrate=3"], ["learningrate", "learning_rate"]),
    "a number for a section": ([FINAL, "--config.data=3"], ["config.data is not a field"]),
    "text for a whole number": (
        [FINAL, "--config.batch_size=many"],
        ["config.batch_size is 'many': it must be a whole number"],
    ),
    "a fraction for a whole number": (
        [FINAL, "--config.batch_size=1.5"],
        ["config.batch_size is '1.5': it must be a whole number"],
    ),
    "true for a whole number": (
        [FINAL, "--config.batch_size=True"],
        ["config.batch_size is 'True': it must be a whole number"],
    ),
    "text for a number": (
        [FINAL, "--config.num_epochs=long"],
        ["config.num_epochs is 'long': it must be a number > 0"],
    ),
    "text in a tuple": (
        [FINAL, "--config.model.block_list=(3,'five',3,0)"],
        ["config.model.block_list is (3, 'five', 3, 0)", "a tuple of one or more whole numbers from 0 to 65536"],
    ),
    "a fraction in a tuple": ([FINAL, "--config.model.block_list=(3,5.5,3,0)"], ["config.model.block_list is (3, 5.5"]),
    "an open tuple": (
        [FINAL, "--config.model.block_list=(3,5"],
        ["config.model.block_list is '(3,5': it must be a tuple of"],
    ),
    "two of three channels": ([FINAL, "--config.data.mean=(0.5,0.5)"], ["config.data.mean is (0.5, 0.5)", "three"]),
    "no number": ([FINAL, "--config.num_epochs=nan"], ["config.num_epochs is nan", "a number > 0"]),
    "no end": ([FINAL, "--config.optim.learning_rate=inf"], ["config.optim.learning_rate is inf", "a number > 0"]),
    "below the range": ([FINAL, "--config.batch_size=-1"], ["config.batch_size is -1", "a whole number from 1 to"]),
    "not a choice": ([FINAL, "--config.model.block=wide"], ["config.model.block is 'wide'", "'basic', 'bottleneck'"]),
    "a whitened stem that is too wide": (
        [FINAL, "--config.model.stem=whitened"],
        ["config.model.channel_list begins with 64", "even number from 2 to 54"],
    ),
    "a whitened stem of an odd width": (
        [FINAL, "--config.model.stem=whitened", "--config.model.channel_list=(7,8,8,8)"],
        ["config.model.channel_list begins with 7", "even number from 2 to 54"],
    ),
    "RandAugment with an unknown number of operations": (
        [FINAL, "--config.augment.policy=rand-m9-n5"],
        ["config.augment.policy is 'rand-m9-n5'", "'rand-m9-n2'", "1 to 4 operations"],
    ),
    "unequal lists": ([FINAL, "--config.model.block_list=(3,5)"], ["channel_list has 4 entries", "block_list 2"]),
    "two crops": (
        [FINAL, "--config.augment.resized_crop_area=0.08"],
        ["resized_crop_area is 0.08 and config.augment.crop_padding 4: set one of them to 0"],
    ),
    "warm-up as long as the run": ([FINAL, "--config.num_epochs=5"], ["warmup_epochs is 5.0", "num_epochs 5.0"]),
    "another optimizer's fields": (
        [FINAL, "--config.optim.name=sgd"],
        ["config.optim.momentum is missing", "config.optim.name 'sgd' needs"],
    ),
    "stray argument": ([FINAL, "train"], ["unrecognized arguments: train", "see python launch.py --help"]),
    "a config without its flag": ([QUICKSTART, "final:smoke"], ["did you mean --config final:smoke?", "--help"]),
    "unknown flag": ([FINAL, "--epochs=3"], ["unrecognized arguments: --epochs=3", "see python launch.py --help"]),
    "unknown mode": ([FINAL, "--mode=test"], ["--mode", "invalid choice: 'test'", "train"]),
    "a profile of no steps": ([FINAL, "--profile=3:0"], ["--profile '3:0' must be START:COUNT"]),
    "a profile from no step": ([FINAL, "--profile=0:3"], ["--profile '0:3' must be START:COUNT"]),
    "a profile of one number": ([FINAL, "--profile=3"], ["--profile '3' must be START:COUNT"]),
    "a search": (
        [f"--config={ROOT}/configs/search.py:smoke"],
        ["config.search.", "use this config with python -m resnet_jax search"],
    ),
    "views while training": ([FINAL, "--views=2"], ["--views", "need --mode eval"]),
    "a temperature while training": ([FINAL, "--fit-temperature"], ["--fit-temperature", "need --mode eval"]),
    "a checkpoint to train": ([FINAL, "--checkpoint=latest"], ["--checkpoint", "need --mode eval"]),
    "a profile of an evaluation": ([FINAL, "--mode=eval", "--profile=3:2"], ["--profile", "need --mode train"]),
    "a time limit for an evaluation": (
        [FINAL, "--mode=eval", "--max-seconds=1"],
        ["--max-seconds", "need --mode train"],
    ),
    "workdir without a value": ([FINAL, "--workdir"], ["--workdir", "expected one argument"]),
    "time that runs backwards": ([FINAL, "--max-seconds=-1"], ["--max-seconds", "must be a number of seconds"]),
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
def test_a_mistake_on_the_command_line_is_one_line_and_leaves_no_file(here, capfd, mistake):
    arguments, words = MISTAKES[mistake]
    line = mistake_of_tool(capfd, *arguments, program=launch_here)
    assert all(word in line for word in words), line
    assert list(here.iterdir()) == []


def test_mistakes_on_the_command_line_are_found_before_jax_is_imported():
    program = (
        "import json, sys; import launch; from resnet_jax.errors import UserError\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: launch.main(arguments)\n"
        "    except UserError: print('jax' in sys.modules)"
    )
    mistakes = json.dumps([arguments for arguments, _ in MISTAKES.values()])
    done = subprocess.run([sys.executable, "-c", program, mistakes], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["False"] * len(MISTAKES)


@pytest.mark.parametrize("mistake", CONFIG_FILES)
def test_a_config_file_that_fails_is_one_line_and_leaves_no_file(here, tmp_path, mistake):
    text, words = CONFIG_FILES[mistake]
    (tmp_path / "config.py").write_text(text)
    assert_user_error(launch("--config", tmp_path / "config.py"), *words)
    assert list(here.iterdir()) == []


@functools.cache
def trained_once():
    """A finished run, for every test of this session."""
    directory = Path(tempfile.mkdtemp()) / "run"
    atexit.register(shutil.rmtree, directory.parent)
    launch_here(*SMOKE, "--workdir", directory)
    return directory


def finished_run(here):
    """A copy of it in a folder."""
    return Path(shutil.copytree(trained_once(), here / "run"))


def instead(path):
    """A path freed of what is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


def save_npz(path, **changed):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    arrays = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images + 1,
        "test_labels": labels,
    } | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def save_images(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)


def damage_every_checkpoint(run):
    for file in run.glob("checkpoints/*/state/_METADATA"):
        file.write_text("{")


# What lies in the folder, by a function of it (and of a finished run in it, "run"); the flags; the environment; the words.
DEEPER_MISTAKES = {
    # data
    "a set that TFDS has not": (
        None,
        ["--config.data.name=cifarr10"],
        {},
        ["'cifarr10'", "such as cifar10 or cifar10:train[:80%], or digits"],
    ),
    "a version that TFDS has not": (
        None,
        ["--config.data.name=cifar10:9.9.9"],
        {},
        ["cannot be loaded at version 9.9.9"],
    ),
    "an npz that is not there": (None, ["--config.data.name=npz:none.npz"], {}, ["none.npz is not a file", "npz:FILE"]),
    "an npz without labels": (
        lambda here: save_npz(here / "d.npz", test_labels=None),
        ["--config.data.name=npz:d.npz"],
        {},
        ["d.npz lacks test_labels"],
    ),
    "an npz of floats": (
        lambda here: save_npz(here / "d.npz", train_images=np.full((4, 8, 8, 3), 7.5)),
        ["--config.data.name=npz:d.npz"],
        {},
        ["train_images is float64 [4, 8, 8, 3] with values from 7.5 to 7.5", "must be uint8"],
    ),
    "an npz with a class without images": (
        lambda here: save_npz(here / "d.npz", train_labels=np.array([0, 2, 0, 2]), test_labels=np.array([0, 2, 2, 2])),
        ["--config.data.name=npz:d.npz"],
        {},
        ["no training image for 1 of 3 classes (1)"],
    ),
    "a text file for an npz": (
        lambda here: (here / "d.npz").write_text("text"),
        ["--config.data.name=npz:d.npz"],
        {},
        ["d.npz cannot be read as an .npz"],
    ),
    "a folder that is not there": (None, ["--config.data.name=folder:none"], {}, ["none is not a folder"]),
    "a folder without test images": (
        lambda here: save_images(here, "d/train/ant/0.png", "d/train/bee/0.png"),
        ["--config.data.name=folder:d"],
        {},
        ["d has no test set", "add images"],
    ),
    "a text file for an image": (
        lambda here: (
            save_images(here, "d/train/ant/0.png", "d/test/ant/0.png"),
            (here / "d/test/ant/1.png").write_text("x"),
        ),
        ["--config.data.name=folder:d"],
        {},
        ["d/test/ant/1.png cannot be read as an image", "fix or remove it"],
    ),
    "a validation split of no image": (
        None,
        ["--config.data.validation_ratio=0.0001"],
        {},
        ["config.data.validation_ratio 0.0001 of 1438 training images leaves no image in one part"],
    ),
    "a size for images that are not decoded": (
        lambda here: save_npz(here / "d.npz"),
        ["--config.data.name=npz:d.npz", "--config.data.image_size=32"],
        {},
        ["config.data.image_size does not apply to npz"],
    ),
    # the machine
    "a batch that devices cannot share": (
        None,
        ["--config.batch_size=63"],
        {},
        ["batch_size 63", "2 devices", "62 or 64"],
    ),
    "a model over its budget": (
        None,
        ["--config.model.max_params=1000"],
        {},
        ["78,042 parameters, but config.model.max_params allows 1,000"],
    ),
    "a platform that JAX has not": (None, [], {"JAX_PLATFORMS": "nonsense"}, ["JAX finds no device", "JAX_PLATFORMS"]),
    "a platform that is not there": (None, [], {"JAX_PLATFORMS": "tpu"}, ["JAX finds no device", "JAX_PLATFORMS"]),
    "a variable that JAX cannot read": (
        None,
        [],
        {"JAX_ENABLE_X64": "banana"},
        ["JAX does not start", "JAX_ENABLE_X64"],
    ),
    "no cluster": (None, ["--distributed"], {}, ["--distributed", "srun"]),
    "data that are neither there nor to be had": (
        None,
        ["--config.data.name=mnist", "--config.data.data_dir=nowhere"],
        {
            "http_proxy": "http://localhost:9",
            "https_proxy": "http://localhost:9",
            "no_proxy": "",
        },  # where nobody listens
        ["mnist is not prepared in", "nowhere", "TFDS_DATA_DIR"],
    ),
    # paths
    "a file for a workdir": (
        lambda here: (here / "run").write_text("mine"),
        [],
        {},
        ["/run is not a writable folder: choose another"],
    ),
    "a workdir in a file": (
        lambda here: (here / "file").write_text("mine"),
        ["--workdir=file/run"],
        {},
        ["--workdir", "file is not a writable folder"],
    ),
    "a workdir of no name": (None, ["--workdir="], {}, ["--workdir '' is not the path of a folder"]),
    "a workdir of a name too long": (None, ["--workdir=" + "a" * 300], {}, ["--workdir", "choose another"]),
    "a file for a cache": (
        lambda here: (save_images(here, "d/train/ant/0.png", "d/test/ant/0.png"), (here / "file").write_text("mine")),
        ["--config.data.name=folder:d", "--config.data.cache_dir=file"],
        {},
        ["file cannot store the decoded data", "set config.data.cache_dir"],
    ),
    # runs and checkpoints
    "a bucket for a workdir": (None, ["--workdir=gs://bucket/run"], {}, ["gs://bucket/run", "mount a bucket"]),
    "a workdir whose name is no text": (None, ["--workdir=caf\udce9"], {}, ["is not the path of a folder"]),
    "a loop of links for a folder": (
        lambda here: (here / "loop").symlink_to("loop"),
        ["--config.data.name=folder:loop"],
        {},
        ["loop is not a folder"],
    ),
    "a link to nowhere among the images": (
        lambda here: (
            save_images(here, "d/train/a/0.png", "d/test/a/0.png"),
            (here / "d/train/a/1.png").symlink_to("no"),
        ),
        ["--config.data.name=folder:d"],
        {},
        ["1.png"],
    ),
    "a model beyond all bounds": (None, ["--config.model.channel_list=(9223372036854775807,16,16)"], {}, ["to 65536"]),
    "no time limit": (None, ["--max-seconds=nan"], {}, ["max-seconds", "must be a number of seconds"]),
    "a profile beyond the run": (None, [*SMOKE, "--profile=11:2"], {}, ["steps 11 to 12", "the run takes 1 to 11"]),
    "a profile of a finished run": (finished_run, [*SMOKE, "--profile=3:2"], {}, ["is complete", "another --workdir"]),
    "evaluating no run": (None, ["--mode=eval"], {}, ["run holds no run", "--workdir"]),
    "evaluating a checkpoint that is not there": (
        finished_run,
        [*SMOKE, "--mode=eval", "--checkpoint=7"],
        {},
        ["no checkpoint of step 7: choose one of 11"],
    ),
    "evaluating a checkpoint of no name": (
        finished_run,
        [*SMOKE, "--mode=eval", "--checkpoint=newest"],
        {},
        ["--checkpoint 'newest' must be best, latest or a step"],
    ),
    "evaluating as another config": (
        finished_run,
        [*SMOKE, "--mode=eval", "--config.seed=1"],
        {},
        ["another config (seed: 0 -> 1)"],
    ),
    "evaluating a damaged checkpoint": (
        lambda here: damage_every_checkpoint(finished_run(here)),
        [*SMOKE, "--mode=eval"],
        {},
        ["checkpoints/11 is damaged", "choose another checkpoint"],
    ),
    "training on as another config": (finished_run, [*SMOKE, "--config.seed=1"], {}, ["another config (seed: 0 -> 1)"]),
    "training on without a whole checkpoint": (
        lambda here: (damage_every_checkpoint(finished_run(here)), (here / "run/result.json").unlink()),
        SMOKE,
        {},
        ["no checkpoint of", "is intact", "checkpoints/11 is damaged"],
    ),
    "a run that lost its config": (
        lambda here: (finished_run(here) / "config.json").unlink(),
        SMOKE,
        {},
        ["result.json exists without the config.json"],
    ),
    "a run whose config is cut off": (
        lambda here: (finished_run(here) / "config.json").write_text("{"),
        SMOKE,
        {},
        ["config.json cannot be used"],
    ),
    "a run whose result holds no figures": (
        lambda here: (finished_run(here) / "result.json").write_text(
            '{"test_accuracy": null, "validation_accuracy": null, "checkpoint_step": 1, "steps": 1, "seconds": null}'
        ),
        SMOKE,
        {},
        ["result.json cannot be used"],
    ),
    "a folder for the log": (
        lambda here: (instead(finished_run(here) / "metrics.jsonl").mkdir(), (here / "run/result.json").unlink()),
        SMOKE,
        {},
        ["metrics.jsonl"],
    ),
    "a file for the events": (
        lambda here: (instead(finished_run(here) / "tensorboard").touch(), (here / "run/result.json").unlink()),
        SMOKE,
        {},
        ["tensorboard cannot be written"],
    ),
    "a run whose result is cut off": (
        lambda here: (finished_run(here) / "result.json").write_text("{"),
        SMOKE,
        {},
        ["result.json cannot be used"],
    ),
}


def contents(folder):
    """Every file below a folder, but for the lock, and what is in it."""
    files = (path for path in folder.rglob("*") if path.name != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in files}


@pytest.mark.parametrize("mistake", DEEPER_MISTAKES)
def test_a_mistake_that_only_data_machine_or_run_show_is_one_line_and_leaves_no_file(here, capfd, monkeypatch, mistake):
    prepare, arguments, environment, words = DEEPER_MISTAKES[mistake]
    if prepare:
        prepare(here)
    before = contents(here)
    arguments = [*([] if SMOKE[0] in arguments else [QUICKSTART]), "--workdir=run", *arguments]
    if "--distributed" in arguments or any(name.startswith("JAX") for name in environment):  # JAX starts once a process
        assert_user_error(launch(*arguments, **environment), *words)
    else:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        line = mistake_of_tool(capfd, *arguments, program=launch_here)
        assert all(word in line for word in words), line
    assert contents(here) == before


def test_help_lists_the_flags_and_starts_nothing(here):
    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = set(re.findall(r"^  (--[\w.-]+)", done.stdout, re.MULTILINE))
    assert shown == {
        *("--config", "--config.FIELD", "--workdir", "--mode", "--checkpoint", "--views", "--fit-temperature"),
        *("--max-seconds", "--extend-to", "--profile", "--distributed"),
    }
    assert list(here.iterdir()) == []


def test_launch_py_is_short():
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 40
