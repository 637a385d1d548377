"""What is said of an error: one line that a terminal can show."""

import os

import numpy as np
import pytest
from PIL import Image

from resnet_jax import errors
from resnet_jax.data import datasets, images, on_disk
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.inference import trained_model, unlabelled
from resnet_jax.runs import exits
from resnet_jax.runs.workdir import open_workdir


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b[2Jcat\x07.png", "\\x1b[2Jcat\\x07.png"),
        ("\udcff\u202e.png", "\\udcff\\u202e.png"),
        ("Käse 犬.png", "Käse 犬.png"),
    ],
)
def test_a_text_is_one_line_of_characters_that_print(text, line, capsys):
    assert errors.one_line(text) == line
    exits.report(UserError(text))
    assert capsys.readouterr().err == f"error: {line}\n"


def test_of_a_long_message_the_middle_is_left_out(capsys):
    exits.report(UserError(f"config.seed is {'9' * 10_000}: it must be smaller"))
    line = capsys.readouterr().err
    assert len(line) < 2100
    assert line.startswith("error: config.seed is 999")
    assert line.endswith("999: it must be smaller\n")


def test_an_error_without_words_is_its_type():
    assert errors.reason(EOFError()) == "EOFError"
    assert errors.reason(ValueError("a\nb")) == "a b"
    assert len(errors.reason(ValueError("x" * 1000))) == 300


READERS = {
    "an image": images.read,
    "unlabelled images": unlabelled.read,
    "unlabelled images as .npz": unlabelled.read,
    "weights": trained_model.load,
    "JSON": files.read_json,
    "a run's lock": lambda path: open_workdir(path.parent, None, {}).__enter__(),
}
NAMES = {"weights": "pipe.safetensors", "unlabelled images as .npz": "pipe.npz", "a run's lock": ".lock"}


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_at_once(tmp_path, kind):
    """To open it would wait for somebody who writes to it."""
    os.mkfifo(path := tmp_path / NAMES.get(kind, "pipe"))
    with pytest.raises((UserError, OSError), match="it is a pipe, a socket or a device, not a file"):
        READERS[kind](path)


def test_a_file_with_a_terminals_commands_in_its_name_is_named_with_escapes(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / part / "cat" / "0.png")
    (tmp_path / "train" / "cat" / "\x1b[31m.png").write_bytes(b"no image")
    with pytest.raises(SystemExit), exits.exit_on_user_error():
        datasets.sources.read_folder(datasets.sources.list_folder(tmp_path)[0], 0, on_disk.Store())
    said = capsys.readouterr().err
    assert "\\x1b[31m.png" in said
    assert "\x1b" not in said
