"""Files of any content, made by mutating good ones: each reader takes them, or refuses them in one line."""

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import optuna
import pytest
from helpers import make_state, make_tiny_config, orbax_drops_its_tasks
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import fuzz, refusal

from configs import final
from configs import search as search_config
from resnet_jax import train_state
from resnet_jax.data import images, on_disk, sources
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.inference import export, predict, torch_weights, trained_model, unlabelled
from resnet_jax.runs import exits, metrics_log, stored_config
from resnet_jax.runs.checkpoints import Checkpoints
from resnet_jax.runs.result import RunResult
from resnet_jax.search import report, space, studies

changes = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6)
cuts = st.one_of(st.none(), st.integers(0, 2**20))


def mutated(whole, changes, cut):
    """Bytes with some of them changed, and cut off."""
    content = bytearray(whole)
    for position, value in changes:
        content[position % len(content)] = value
    return bytes(content if cut is None else content[: cut % len(content)])


def is_read_or_refused(read, name, content):
    """Read a file of this name and content; None, or the one line of its refusal."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        message = refusal(lambda: read(path))
    assert message is None or message.strip()
    return message


# Images

Image.init()


def of_every_format():
    """A small image in each format that Pillow writes, in each mode that the format knows."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "F"):
            stream = io.BytesIO()
            with contextlib.suppress(Exception):  # a mode that the format does not know, or a program that is missing
                noise.convert("L" if mode == "I;16" else mode).convert(mode).save(stream, kind)
                yield stream.getvalue()


IMAGES = [content for content in of_every_format() if content]
assert len(IMAGES) > 60


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@fuzz
@given(st.sampled_from(IMAGES), changes, cuts, st.sampled_from(["a.png", "a.tif", "a"]))
def test_an_image_of_any_format_is_read_or_refused(whole, changes, cut, name):
    def read(path):
        images.is_image(path)
        arrays = sources.read_folder([sources.LabelledFile(path, "train", "a")], 8, on_disk.Store())
        assert arrays["train_images"].shape == (1, 8, 8, 3)

    is_read_or_refused(read, name, mutated(whole, changes, cut))


# JSON

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from([1e308, 10**400, -1e308]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
json_files = st.one_of(
    st.binary(max_size=40),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.integers(1, 200_000).map(lambda depth: b'{"a":' * depth),
    st.integers(1, 200_000).map(lambda depth: b"[" * depth + b"]" * depth),
    st.integers(1, 20_000).map(lambda digits: b'{"step": ' + b"9" * digits + b', "split": "test"}\n'),
)


@fuzz
@given(json_files)
def test_json_of_any_content_is_read_or_refused(content):
    is_read_or_refused(files.read_json, "a.json", content)


@fuzz
@given(json_files)
def test_lines_of_metrics_of_any_content_are_read_or_passed_over(content):
    is_read_or_refused(lambda path: metrics_log.validations(path.parent), "metrics.jsonl", content)


RESULT = RunResult(0.5, 1.0, 0.5, 10, 4, 4, 1.0, {}, {"splits": {}}, {}, "0" * 64)


@fuzz
@given(
    st.dictionaries(st.sampled_from(sorted(RESULT.__dataclass_fields__)), json_values, max_size=3),
)
@example({"seconds": 10**310})
@example({"test_accuracy": -(10**310)})
def test_a_result_with_any_values_is_read_or_refused(changed):
    content = json.dumps(RESULT.__dict__ | changed).encode()
    is_read_or_refused(lambda path: RunResult.read(path.parent).summary(), "result.json", content)


# Metadata of checkpoints

META = {
    "config": stored_config.to_json(final.get_config()),
    "fingerprint": "0" * 64,
    "class_names": ["cat", "dog"],
    "image_shape": [8, 8, 3],
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, cache_dir):
    """The folder of a checkpoint of step 1."""
    directory = tmp_path_factory.mktemp("checkpoints")
    state = make_state(make_tiny_config(cache_dir), 2, (8, 8, 3), 1.0, train_state.make_mesh())
    with contextlib.closing(Checkpoints(directory, {})) as checkpoints:
        checkpoints.save(state.replace(step=np.int32(1)), META)
    return directory


@orbax_drops_its_tasks
@fuzz
@given(st.dictionaries(st.sampled_from([*META, "digests"]), json_values, max_size=2), st.booleans(), changes, cuts)
def test_metadata_of_a_checkpoint_of_any_content_are_read_or_refused(checkpoint, values, is_sealed, changes, cut):
    file = checkpoint / "1" / "meta" / "metadata"
    whole = file.read_bytes()
    meta = json.loads(whole) | values
    if is_sealed:
        meta["digest"] = files.digest({name: value for name, value in meta.items() if name != "digest"})

    def read():
        with contextlib.closing(Checkpoints(checkpoint, {}, read_only=True)) as checkpoints:
            config = checkpoints.meta(1)["config"]
        stored_config.differences(final.get_config(), config)
        stored_config.from_json(config)

    file.write_bytes(mutated(json.dumps(meta).encode(), changes, cut))
    try:
        message = refusal(read)
    finally:
        file.write_bytes(whole)
    assert message is None or message.strip()


# Journals


def journal():
    """The journal of a small search."""
    with tempfile.TemporaryDirectory() as directory, studies.opened(f"{directory}/j", create=True) as storage:
        study = optuna.create_study(study_name="s-grid", storage=storage, direction="maximize")
        config = search_config.get_config("smoke")
        known = {"candidates": 2, "config": stored_config.to_json(config), "fingerprint": "0", "environment": {}}
        for key, value in known.items():
            study.set_user_attr(key, value)
        for value in (0.5, 0.6):
            trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
            for key, value in {"fields": space.own(config), "num_params": 9, "gflops": 0.1}.items():
                trial.set_user_attr(key, value)
            trial.report(value, 1)
            study.tell(trial, value)
        return (Path(directory) / "j").read_bytes().splitlines(keepends=True)


JOURNAL = journal()


@st.composite
def journals(draw):
    """The lines of a journal with one of them changed, left out, said twice, or another value in it."""
    lines = list(JOURNAL)
    i = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["bytes", "value", "leave out", "twice", "cut", "any"]))
    if how == "bytes":
        lines[i] = mutated(lines[i], draw(changes), None)
    elif how == "value":
        row = json.loads(lines[i])
        row[draw(st.sampled_from(sorted(row)))] = draw(json_values)
        lines[i] = json.dumps(row).encode() + b"\n"
    elif how == "cut":
        lines[i] = lines[i][: draw(st.integers(0, len(lines[i])))]
    elif how == "any":
        lines[i] = draw(json_files) + b"\n"
    else:
        lines[i : i + 1] = [lines[i]] * 2 * (how == "twice")
    return b"".join(lines)


@fuzz
@given(journals())
def test_a_journal_with_any_lines_is_read_or_refused(content):
    is_read_or_refused(lambda path: report.read("s", str(path)), "journal", content)


def test_the_journal_as_it_was_written_is_read():
    assert is_read_or_refused(lambda path: report.read("s", str(path)), "journal", b"".join(JOURNAL)) is None


# Weights and exports


def safetensors(header, payload=b""):
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + payload


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 2**31, 2**40, 2**62, -1]), max_size=40),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 2**40, 2**63]), min_size=1, max_size=3),
    }
)


@pytest.fixture(scope="module")
def exports(run):
    """The bytes of the exports of a run, by suffix."""
    model = trained_model.load(run)
    held = {}
    with tempfile.TemporaryDirectory() as directory:
        for kind in ("safetensors", "stablehlo"):
            path = Path(directory) / f"model.{kind}"
            export.write(model, kind, path)
            held[path.suffix] = path.read_bytes()
    return held


@fuzz
@given(
    st.dictionaries(st.text(max_size=6), st.one_of(tensors, json_values), max_size=3),
    st.binary(max_size=16),
    st.one_of(st.none(), json_values),
)
def test_safetensors_of_any_header_are_read_or_refused(header, payload, meta):
    header = header | ({} if meta is None else {"__metadata__": {"resnet_jax": json.dumps(meta)}})
    content = safetensors(header, payload)
    is_read_or_refused(torch_weights.read, "a.safetensors", content)
    assert is_read_or_refused(trained_model.load, "a.safetensors", content)


@fuzz
@given(st.sampled_from([".safetensors", ".stablehlo"]), changes, cuts)
def test_an_export_with_other_bytes_is_read_or_refused(exports, suffix, changes, cut):
    content = mutated(exports[suffix], changes, cut)
    message = is_read_or_refused(trained_model.load, f"a{suffix}", content)
    assert message or content == exports[suffix] or suffix == ".stablehlo"


@fuzz
@given(st.sampled_from([".safetensors", ".stablehlo"]), st.data())
def test_an_export_with_other_metadata_is_read_or_refused(exports, suffix, data):
    """Also where its seal is right, as of a file that a person made."""
    from resnet_jax.inference.trained_model import _FILES

    def read(path):
        path.write_bytes(exports[suffix])
        meta, *rest = _FILES[suffix](path)  # which has checked the seal
        key = data.draw(st.sampled_from(sorted(meta)))
        meta[key] = data.draw(json_values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_FILES, suffix, lambda _: (meta, *rest))
            trained_model.load(path)

    is_read_or_refused(read, f"a{suffix}", b"")


# Arrays


def npy(header, payload):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + payload


@fuzz
@given(
    st.lists(st.sampled_from([0, 1, 3, 2**31, 2**40, 2**62]), max_size=5).map(tuple),
    st.sampled_from(["|u1", "<f8", "<U9", "|O", "|S1000000000"]),
    st.binary(max_size=16),
)
def test_an_array_of_any_shape_is_read_or_refused(shape, dtype, payload):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("data", "ids"):
            archive.writestr(f"{name}.npy", npy({"descr": dtype, "fortran_order": False, "shape": shape}, payload))
    is_read_or_refused(torch_weights.read, "a.npz", stream.getvalue())
    is_read_or_refused(unlabelled.read, "a.npz", stream.getvalue())


@fuzz
@given(st.integers(0, pickle.HIGHEST_PROTOCOL), changes, cuts)
def test_a_pickle_with_other_bytes_is_read_or_refused(protocol, changes, cut):
    unlabelled_images = {b"data": np.zeros((2, 4, 4, 3), np.uint8), b"ids": np.arange(2)}
    is_read_or_refused(unlabelled.read, "a.pkl", mutated(pickle.dumps(unlabelled_images, protocol), changes, cut))


# Names of files

names = st.one_of(
    st.binary(min_size=1, max_size=20), st.text(min_size=1, max_size=12).map(lambda t: t.encode("utf-8", "replace"))
).filter(lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..") and len(name) < 200)


@fuzz
@given(st.lists(names, min_size=1, max_size=3, unique=True))
def test_names_of_any_bytes_are_shown_with_escapes(held):
    out, terminal, err = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
    terminal.isatty = lambda: True
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(err):
        for name in held:
            (Path(directory) / os.fsdecode(name)).write_bytes(b"\x89PNG\r\n\x1a\n")
        listed = [Path(directory) / os.fsdecode(name) for name in held]
        for _ in predict.Batches(listed, np.asarray, 8):
            raise AssertionError("none is an image")
        exits.report(UserError(f"{listed[0]} cannot be read"))
        rows = [(str(path), [(path.name, 1.0)]) for path in listed]
        predict.write_table(out, rows, 3)
        predict.write_csv(terminal, rows, 3)
    err.flush()
    shown = err.buffer.getvalue().decode()
    assert len(shown.splitlines()) == len(held) + 1
    assert all(line.isprintable() for line in (shown + out.getvalue() + terminal.getvalue()).splitlines())
    assert len(out.getvalue().splitlines()) == len(held)
    out.getvalue().encode()
