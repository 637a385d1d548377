import csv
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import assert_user_error, launch, make_tiny_config, tool
from PIL import Image

from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import predict, trained_model, unlabelled

PREDICT = ("-m", "resnet_jax", "predict")


@pytest.fixture(scope="module")
def digits(cache_dir):
    """Some test images of digits."""
    return datasets.load(make_tiny_config(cache_dir).data).test.images[:6]


@pytest.fixture
def folder(tmp_path, digits):
    """A folder of images, one of them deeper, and a file of something else."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.fromarray(digits[0]).save(tmp_path / "photos" / "a.png")
    Image.fromarray(digits[1]).resize((64, 80)).save(tmp_path / "photos" / "b.JPG", "JPEG")
    Image.fromarray(digits[2]).save(tmp_path / "photos" / "more" / "c.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    np.savez(tmp_path / "digits.npz", images=digits)
    return tmp_path


def call(capsys, *arguments):
    """What the tool prints, in this process, on stdout and on stderr."""
    capsys.readouterr()
    tool("predict", *arguments)
    return capsys.readouterr()


def refused(capsys, *arguments):
    """The lines on stderr of a call that ends with exit code 2, and what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tool("predict", *arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    return printed.err.splitlines(), printed.out


# Files


def test_files_folders_patterns_and_npz(run, folder, digits, capsys):
    printed = call(capsys, run, folder / "photos", f"{folder}/photos/*.png", folder / "digits.npz", "--json").out
    found = json.loads(printed)
    photos = folder / "photos"
    names = [photos / "a.png", photos / "b.JPG", photos / "more" / "c.png", photos / "a.png"]
    assert [row["file"] for row in found] == [*map(str, names), *(f"{folder / 'digits.npz'}[{i}]" for i in range(6))]
    expected = trained_model.load(run).predict(digits)
    for row, probabilities in zip(found[4:], expected.probabilities, strict=True):
        order = np.argsort(-probabilities)[:3]
        assert [entry["class"] for entry in row["predictions"]] == [str(i) for i in order]
        assert [entry["probability"] for entry in row["predictions"]] == pytest.approx(probabilities[order], abs=1e-5)


def test_files_of_a_pattern_that_are_no_images_are_left_out_and_counted_as_in_a_folder(run, folder, capsys):
    photos = folder / "photos"
    (photos / "readme.md").write_text("no image")
    shutil.copy(photos / "a.png", photos / "nameless")
    shutil.copy(folder / "digits.npz", photos / "some.npz")
    for pattern, note, count in (
        (f"{photos}/*", "left out 2 files that are no images", 9),
        (f"{photos}/**", "left out 2 files", 10),
    ):
        printed = call(capsys, run, pattern, "--json")
        assert printed.err.startswith(f"{pattern}: {note}")
        assert len(json.loads(printed.out)) == count
    words, _ = refused(capsys, run, f"{photos}/*.md")
    assert words[0] == f"{photos}/*.md: left out a file that is no image"
    assert "names no image" in words[1]


def test_a_link_to_a_folder_around_it_does_not_show_its_images_again(run, folder, capsys):
    plain = call(capsys, run, f"{folder}/**", "--json").out
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert call(capsys, run, f"{folder}/**", "--json").out == plain


def test_the_table_and_the_csv(run, folder, capsys):
    table = call(capsys, run, folder / "photos" / "a.png", "--top=2").out
    as_csv = list(csv.DictReader(io.StringIO(call(capsys, run, folder / "photos" / "a.png", "--csv", "--top=20").out)))
    assert [row["rank"] for row in as_csv] == [str(i) for i in range(1, 11)]  # there are no more classes
    assert sum(float(row["probability"]) for row in as_csv) == pytest.approx(1, abs=1e-5)
    first, second = as_csv[:2]
    wanted = "  ".join(f"{row['class']} {float(row['probability']):.1%}" for row in (first, second))
    assert table == f"{folder / 'photos' / 'a.png'}  {wanted}\n"


def test_two_views_change_what_is_said(run, folder, digits, capsys):
    found = json.loads(call(capsys, run, folder / "digits.npz", "--json", "--views=2", "--top=1").out)
    expected = trained_model.load(run).predict(digits, views=2)
    assert [row["predictions"][0]["class"] for row in found] == expected.names


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_shown(run, folder, capsys):
    (folder / "photos" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    np.savez(folder / "many.npz", a=np.zeros(3), b=np.zeros(3))
    np.savez(folder / "floats.npz", images=np.full((1, 8, 8, 3), 7.0))
    (note, *lines), out = refused(capsys, run, folder / "photos", folder / "many.npz", folder / "floats.npz", "--json")
    assert note == f"{folder}/photos: left out a file that is no image"
    assert len(lines) == 4
    assert lines[0].startswith(f"warning: {folder}/photos/bad.png cannot be read (")
    assert "many.npz cannot be read (it holds a, b: name the array of images 'images')" in lines[1]
    assert "floats.npz cannot be read (float images have values from 7 to 7" in lines[2]
    assert all(line.startswith("warning: ") for line in lines[:3])
    assert lines[3] == "error: 3 of 6 files could not be read: fix them, or leave them out"
    assert [row["file"][-5:] for row in json.loads(out)] == ["a.png", "b.JPG", "c.png"]


def test_a_folder_of_many_files_is_read_and_written_a_batch_at_a_time(tmp_path):
    events = []
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)

    def as_batch(pixels):
        events.append("read")
        return pixels[None]

    batches = predict.Batches([*paths[:5], tmp_path / "missing.png", *paths[5:]], as_batch, size=4)
    for names, batch in batches:
        assert batch.shape == (len(names), 8, 8, 3)
        events.append([name[-5:] for name in names])
    assert [e for e in events if e != "read"] == [
        ["0.png", "1.png", "2.png", "3.png"],
        ["4.png", "5.png", "6.png", "7.png"],
        ["8.png", "9.png"],
    ]
    assert events.index(["0.png", "1.png", "2.png", "3.png"]) == 5  # nothing is read far ahead of what is written
    assert batches.unreadable == 1


def test_a_name_with_a_line_break_is_one_line_of_the_table():
    out = io.StringIO()
    predict.write_table(out, iter([("a\nb.png", [("cat", 0.5)]), ("é.png", [("dog", 1.0)])]), 8)
    assert out.getvalue() == "a\\nb.png  cat 50.0%\né.png     dog 100.0%\n"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_that_is_written_as_it_comes_is_a_list(count):
    out = io.StringIO()
    rows = [(f"{i}.png", [("cat", 0.5), ("dog", 0.25)]) for i in range(count)]
    predict.write_json(out, iter(rows), 5)
    expected = [{"file": name, "predictions": [{"class": c, "probability": p} for c, p in top]} for name, top in rows]
    assert out.getvalue() == json.dumps(expected, indent=2) + "\n"


def test_how_many_files_are_done_is_shown_on_a_terminal(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(trained_model, "LARGEST_BATCH", 2)
    tool("predict", run, folder / "photos", "--csv")
    assert "\r\033[K2 of 3 files" in capsys.readouterr().err


# Unlabelled images


def submission(path):
    return [line.split(",") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("ids", ["array", "list", "text"])
def test_the_authors_pickled_dict(run, digits, tmp_path, capsys, protocol, ids):
    numbers = np.array([5, 3, 4, 0, 2, 1])
    held = {"array": numbers, "list": [*numbers], "text": [f"x{i}" for i in numbers]}[ids]
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({b"data": digits, b"ids": held}, protocol))
    printed = call(capsys, run, "--unlabelled", tmp_path / "test.pkl", "--output", tmp_path / "out.csv").out
    assert printed == f"{tmp_path / 'out.csv'}: 6 images\n"
    labels = trained_model.load(run).predict(digits).labels
    expected = [[str(i), str(label)] for i, label in zip(held, labels, strict=True)]
    assert submission(tmp_path / "out.csv") == [["ID", "Labels"], *expected]


def test_an_npz_of_unlabelled_images(run, digits, tmp_path, capsys):
    np.savez(tmp_path / "test.npz", data=digits, ids=np.arange(6))
    call(capsys, run, "--unlabelled", tmp_path / "test.npz", "--output", tmp_path / "out.csv")
    assert [row[0] for row in submission(tmp_path / "out.csv")] == ["ID", *"012345"]


class Hostile:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "os.system": Hostile(os.system, ("touch {path}",)),
    "eval": Hostile(eval, ("open({path!r}, 'w')",)),
    "open": Hostile(open, ("{path}", "w")),
    "numpy.save": Hostile(np.save, ("{path}", np.zeros(1))),
    "numpy.load": Hostile(np.load, ("{path}",)),
    "a class of ours": UserError("x"),
    "in an array": np.array([Hostile(os.system, ("touch {path}",))], dtype=object),
    "subprocess": Hostile(subprocess.Popen, (["touch", "{path}"],)),
    "an array of pointers": Hostile(np.ndarray, ((1,), np.dtype("O"), b"A" * 8)),
    "a dtype with fields": np.zeros(2, [("a", "u1"), ("b", "O")]),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_refused_and_calls_nothing(tmp_path, kind, protocol):
    raw = pickle.dumps({b"data": HOSTILE[kind], b"ids": [1]}, protocol)
    (tmp_path / "test.pkl").write_bytes(raw)
    before = sorted(tmp_path.iterdir())
    wanted = (
        r"it would call [\w.]+, but only NumPy arrays are supported|it has arrays of [OV]\d+, but only numbers and text"
    )
    with pytest.raises(UserError, match=rf"cannot be used \(({wanted})"):
        unlabelled.read(tmp_path / "test.pkl")
    assert sorted(tmp_path.iterdir()) == before


def changing(module, name, attributes):
    """A pickle that asks for a function or class and then sets its attributes."""
    state = pickle.dumps((None, attributes), 2)[2:-1]  # without the protocol and the end
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."


@pytest.mark.parametrize("name", ["_codecs encode", "numpy dtype", "numpy ndarray", "numpy.core.multiarray scalar"])
@pytest.mark.parametrize("attributes", [{"__defaults__": (1,)}, {"note": 1}, {"_make": 1}, {"__class__": 1}])
def test_a_pickle_cannot_change_a_function(tmp_path, name, attributes):
    before = {key: dict(vars(value)) for key, value in unlabelled._MAKERS.items() if value}
    (tmp_path / "test.pkl").write_bytes(changing(*name.split(), attributes))
    with pytest.raises(UserError, match=r"cannot be used \(it would change"):
        unlabelled.read(tmp_path / "test.pkl")
    assert {key: dict(vars(value)) for key, value in unlabelled._MAKERS.items() if value} == before


@pytest.mark.parametrize("arguments", [((4,), "u1", b"AAAA"), ((2**40,), "u1"), ((1,), "u1", bytes(9), 2**40)])
def test_arrays_are_made_by_their_own_bytes_alone(tmp_path, arguments):
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({b"data": Hostile(np.ndarray, arguments), b"ids": [1]}))
    with pytest.raises(UserError, match="cannot be used"):
        unlabelled.read(tmp_path / "test.pkl")


def bomb(levels):
    """A list that is small in a file, and whose values are without number."""
    held = [1]
    for _ in range(levels):
        held = [held, held]
    return held


@pytest.mark.parametrize("turned", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 0, 2, 1)])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_in_any_order_are_read(tmp_path, digits, turned, protocol):
    transposed = np.ascontiguousarray(digits.transpose(turned)).transpose(np.argsort(turned))
    ids = np.arange(6, dtype=">i4")
    (tmp_path / "test.pkl").write_bytes(pickle.dumps({b"data": transposed, b"ids": ids}, protocol))
    data, texts = unlabelled.read(tmp_path / "test.pkl")
    np.testing.assert_array_equal(data, digits)
    assert texts == [*"012345"]


def test_ids_are_quoted_as_csv_is(run, digits, tmp_path, capsys):
    ids = ["a,1", "b\n7,3", 'say "c"', "d", "e", "f"]
    np.savez(tmp_path / "test.npz", data=digits, ids=ids)
    call(capsys, run, "--unlabelled", tmp_path / "test.npz", "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["ID"] for row in csv.DictReader(file)] == ids


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([1, 2], "it holds a list"),
        ({b"data": bomb(200), b"ids": [1]}, "its data are a list"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": bomb(200)}, "its ids are not a list of 1 entries"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": [b"\xff\xfe"]}, "codec can't decode byte 0xff"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": ["\udc80"]}, "codec can't encode character"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": [True]}, "its ids have type bool"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8)}, "it lacks ids"),
        ({b"data": np.zeros((1, 192), np.uint8), b"ids": [1]}, r"its data are uint8 \(1, 192\)"),
        ({b"data": np.zeros((1, 8, 8, 3)), b"ids": [1]}, "its data are float64"),
        (
            {b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": [1, 2]},
            "its ids are not a list of 1 entries, one for each image",
        ),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": [None]}, "its ids have type NoneType"),
        ({b"data": np.zeros((1, 8, 8, 3), np.uint8), b"ids": [[1], [2, 3]]}, "cannot be used"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, held, words):
    (tmp_path / "test.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(UserError, match=words):
        unlabelled.read(tmp_path / "test.pkl")


@pytest.mark.parametrize("raw", [b"", b"no pickle", b"\x80\x05N.", pickle.dumps({b"data": 1})[:-3]])
def test_a_damaged_pickle_is_refused(tmp_path, raw):
    (tmp_path / "test.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be used"):
        unlabelled.read(tmp_path / "test.pkl")


# Mistakes

MISTAKES = {
    "no images": (["{run}"], "give either images, or --unlabelled FILE --output CSV"),
    "both": (["{run}", "a.png", "--unlabelled", "x", "--output", "y"], "give either images, or"),
    "no output": (["{run}", "--unlabelled", "x"], "need each other: give both"),
    "no such file": (["{run}", "nowhere.png"], "nowhere.png names no image"),
    "an empty folder": (["{run}", "."], ". names no image"),
    "no run": ([".", "one.png"], ". holds no run with checkpoints"),
    "no such checkpoint": (["{run}", "one.png", "--checkpoint=9"], "holds no checkpoint of step 9"),
    "top of nothing": (["{run}", "one.png", "--top=0"], "--top must be at least 1, got 0"),
    "no such pickle": (["{run}", "--unlabelled", "x", "--output", "y"], "--unlabelled x cannot be used"),
    "an output that is the input": (
        ["{run}", "--unlabelled", "u.npz", "--output", "u.npz"],
        "would overwrite the file of --unlabelled",
    ),
    "images of nothing": (
        ["{run}", "--unlabelled", "flat.npz", "--output", "y"],
        "flat.npz cannot be used (images have",
    ),
    "images too thin": (["{run}", "--unlabelled", "thin.npz", "--output", "y"], "one side may be at most 1000 times"),
    "a style of no table": (["{run}", "--unlabelled", "u.npz", "--output", "y", "--json"], "leave them out"),
    "a user who is not there": (["~nouser/x", "one.png"], "~nouser/x holds no run"),
    "a name that is too long": (["{run}", "x" * 5000], "File name too long"),
    "an output nowhere": (["{run}", "--unlabelled", "u.npz", "--output", "no/y"], "no/y cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    if mistake != "an empty folder":
        Image.new("RGB", (8, 8)).save("one.png")
        for name, shape in {"u": (1, 8, 8, 3), "flat": (1, 0, 8, 3), "thin": (1, 1, 5000, 3)}.items():
            np.savez(f"{name}.npz", data=np.zeros(shape, np.uint8), ids=[1])
    arguments, words = MISTAKES[mistake]
    (line,), out = refused(capsys, *(argument.format(run=run) for argument in arguments))
    assert line.startswith("error: ")
    assert words in line
    assert out == ""


def test_it_says_on_a_terminal_that_it_is_loading(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tool("predict", run, folder / "photos" / "a.png")
    tool("export", run, "--format=safetensors", f"--output={folder}/x.safetensors")
    assert capsys.readouterr().err == f"loading {run} ...\n" * 2
    with pytest.raises(SystemExit):
        tool("serve", folder / "nowhere", "--port=0")
    assert capsys.readouterr().err.startswith(f"loading {folder}/nowhere ...\nerror: ")


def test_it_runs_as_a_program(run, folder, tmp_path):
    done = launch(run, folder / "photos" / "a.png", program=PREDICT)
    assert (done.returncode, done.stderr) == (0, "")
    assert_user_error(launch(run, tmp_path / "nowhere", program=PREDICT), "names no image")
    assert sys.executable


def test_a_folder_that_cannot_be_read_is_named(run, tmp_path, monkeypatch, capsys):
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/locked"))

    monkeypatch.setattr(predict.os, "walk", walk)
    (line,), _ = refused(capsys, run, tmp_path)
    assert line == f"error: {tmp_path}/locked cannot be read (Permission denied): fix this, or leave it out"


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [("/dev/full", 2, "error: [Errno "), ("a pipe that nobody reads", 128 + signal.SIGPIPE, "")],
    ids=["a full disk", "a pipe that nobody reads"],
)
def test_what_cannot_be_printed_ends_the_tool(run, tmp_path, target, code, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *PREDICT, run, tmp_path / "one.png"],
            stdout=full if target == "/dev/full" else writer, stderr=subprocess.PIPE, text=True, timeout=600,
        )  # fmt: skip
    os.close(writer)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert len(done.stderr.splitlines()) == bool(words)
