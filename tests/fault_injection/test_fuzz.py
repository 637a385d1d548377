"""What is read from a user, of any form: taken, or refused in one line, and never a traceback.

The examples are the same in every run; RESNET_JAX_FUZZ_EXAMPLES asks for as many others (`make soak`).
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import final
from resnet_jax import config
from resnet_jax.cli import command_line
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import serve
from resnet_jax.runs import stored_config

EXAMPLES = int(os.environ.get("RESNET_JAX_FUZZ_EXAMPLES", 0))
fuzz = hypothesis.settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def refusal(call):
    """The message of the `UserError` that a call raises; None where it raises none, and any other error is a failure."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
values = st.one_of(
    numbers, st.text(max_size=8), st.lists(numbers, max_size=5), st.lists(numbers, max_size=5).map(tuple)
)


@fuzz
@given(st.sampled_from(sorted(config.FIELDS)), values)
def test_a_config_with_any_value_is_valid_or_refused_by_the_fields_name(name, value):
    drawn = final.get_config()
    section, _, field = name.rpartition(".")
    with drawn.ignore_type():
        (drawn[section] if section else drawn)[field] = value
    message = refusal(lambda: config.validate(drawn))
    if message is None:
        assert stored_config.differences(drawn, stored_config.to_json(drawn)) == []
    else:
        assert name.split(".")[0] in message


names = st.one_of(st.sampled_from(sorted(config.ALL_FIELDS)), st.text(max_size=12))
texts = st.one_of(values.map(str), values.map(repr), st.text(max_size=12))


@fuzz
@given(st.lists(st.tuples(names, texts), min_size=1, max_size=3))
def test_any_override_is_taken_or_refused_in_one_line(overrides):
    message = refusal(
        lambda: command_line.load_config(final.__file__, [f"--config.{name}={text}" for name, text in overrides])
    )
    assert message is None or message


def is_data_or_refused(name, cache_dir):
    """Load a data set: it is one by every rule, or a `UserError` of one line."""
    data = final.get_config().data
    data.name, data.cache_dir = name, cache_dir
    with contextlib.redirect_stderr(io.StringIO()):
        message = refusal(lambda: datasets.load(data))
    if message is not None:
        assert message.strip()
        return
    dataset = datasets.load(data)
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    for images, labels in (dataset.train, dataset.test):
        assert images.dtype == np.uint8
        assert images.ndim == 4
        assert images.shape[3] == 3
        assert labels.dtype == np.int32
        assert labels.shape == images.shape[:1] != (0,)
        assert set(labels.tolist()) <= set(range(len(dataset.class_names)))
    assert set(dataset.train.labels.tolist()) == set(range(len(dataset.class_names)))


dtypes = st.sampled_from(["u1", "i4", ">i8", "u8", "f4", "f8", "c8", "?", "U3", "S3", "M8[s]", "V2"])
shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=5).map(tuple), st.sampled_from([(3, 2, 2, 3), (4, 2, 2, 3), (3,), (4,)])
)


@st.composite
def arrays(draw):
    """An array of any dtype and shape, its bytes drawn."""
    dtype, shape = np.dtype(draw(dtypes)), draw(shapes)
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, draw(st.sampled_from([1, 2, 256])), size)
    return np.frombuffer(content.astype(np.uint8).tobytes(), dtype).reshape(shape)


good = {
    "train_images": np.zeros((3, 2, 2, 3), np.uint8),
    "train_labels": np.array([0, 1, 2]),
    "test_images": np.ones((2, 2, 2, 3), np.uint8),
    "test_labels": np.array([0, 2]),
    "class_names": np.array(["ant", "bee", "cat"]),
}


@fuzz
@given(st.dictionaries(st.sampled_from([*good, "fingerprint", "other"]), st.one_of(arrays(), st.none()), max_size=4))
def test_an_npz_of_any_arrays_is_a_data_set_or_refused(changed):
    held = {key: array for key, array in (good | changed).items() if array is not None}
    with tempfile.TemporaryDirectory() as directory:
        np.savez(Path(directory) / "data.npz", **held)
        is_data_or_refused(f"npz:{directory}/data.npz", f"{directory}/cache")


@st.composite
def image_files(draw):
    """The bytes of an image file of some format and mode, with some of them changed, or cut off."""
    mode = draw(st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"]))
    kind = draw(st.sampled_from(["png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm"]))
    buffer = io.BytesIO()
    try:
        Image.new(mode, draw(st.sampled_from([(4, 4), (4, 5)]))).save(buffer, kind)
    except (OSError, KeyError, ValueError):  # a mode that the format does not know
        return draw(st.binary(max_size=64))
    content = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.none(), st.integers(0, len(content))))])


paths = st.builds(
    "{}/{}/{}".format,
    st.sampled_from(["train", "test"]),
    st.sampled_from(["ant", "bee", ".hidden", "ü"]),
    st.sampled_from(["0.png", "1.jpg", "2", ".DS_Store", "\udcff.png"]),
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata that it passes over
@fuzz
@given(st.dictionaries(paths, image_files(), max_size=6))
def test_a_folder_of_any_files_is_a_data_set_or_refused(files):
    with tempfile.TemporaryDirectory() as directory:
        for path in ("train/ant/good.png", "test/ant/good.png"):
            (Path(directory) / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(Path(directory) / path)
        for path, content in files.items():
            (Path(directory) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(directory) / path).write_bytes(content)
        is_data_or_refused(f"folder:{directory}", f"{directory}/cache")


def _file_of_noise(kind):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


PICTURES = [_file_of_noise(kind) for kind in ("PNG", "JPEG", "WEBP")]


@fuzz
@given(
    st.sampled_from(PICTURES),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.binary(max_size=9),
)
def test_an_upload_of_any_bytes_is_a_picture_or_refused(whole, changes, tail):
    upload = bytearray(whole)
    for position, value in changes:
        upload[position % len(upload)] = value
    try:
        found = serve.picture(bytes(upload + tail), (8, 8, 3))
    except ValueError as error:
        assert str(error).startswith(("This file cannot be read.", "This image cannot be used: "))  # noqa: PT017
    else:
        assert found.shape == (1, 8, 8, 3)
        assert found.dtype == np.uint8
