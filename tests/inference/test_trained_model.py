import json
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from absl import logging
from helpers import make_state, make_tiny_config
from PIL import Image

import resnet_jax
from resnet_jax import models, steps, train_state
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import trained_model
from resnet_jax.inference.restore import restore_run

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def model(run):
    return trained_model.load(run)


@pytest.fixture(scope="module")
def images(cache_dir):
    """The test images of digits."""
    return datasets.load(make_tiny_config(cache_dir).data).test.images


def test_it_says_what_evaluation_counted(run, model, images, cache_dir):
    predicted = model.predict(images)
    labels = datasets.load(make_tiny_config(cache_dir).data).test.labels
    result = json.loads((run / "result.json").read_text())
    assert (predicted.labels == labels).mean() == result["test_accuracy"]
    losses = -np.log(predicted.probabilities[np.arange(len(labels)), labels])
    assert losses.mean() == pytest.approx(result["test_loss"], rel=1e-4)  # float32, batches of another size
    assert model.step == result["checkpoint_step"]
    assert model.class_names == tuple("0123456789")
    assert model.image_shape == SHAPE


def test_probabilities_and_names_belong_to_the_labels(model, images):
    predicted = model.predict(images[:7])
    assert predicted.probabilities.shape == (7, 10)
    assert predicted.probabilities.dtype == np.float32
    np.testing.assert_allclose(predicted.probabilities.sum(axis=1), 1, atol=1e-6)
    assert (predicted.probabilities.argmax(axis=1) == predicted.labels).all()
    assert predicted.names == [str(label) for label in predicted.labels]


@pytest.mark.parametrize("count", [0, 1, 3, 128, 129, 300])
def test_any_number_of_images_gives_each_the_same(model, images, count):
    together = model.predict(images[:count])
    assert together.probabilities.shape == (count, 10)
    for i in range(0, count, 50):
        one = model.predict(images[i])
        np.testing.assert_allclose(
            one.probabilities[0], together.probabilities[i], atol=1e-5
        )  # other batch, other sums


def test_few_sizes_are_compiled(run, images):
    model = trained_model.load(run)
    for count in (1, 2, 3, 4, 5, 7, 8, 120, 128, 256, 360):
        model.predict(images[:count])
    assert model._logits._cache_size() <= 8


def test_floats_and_grey_and_lists_say_the_same(model, images):
    few = images[:5]
    expected = model.predict(few).probabilities
    for same in (
        few / 255,
        (few / 255).astype(np.float32),
        [*few],
        [few[0], few[1:] / 255],
        few[..., :1],
        [few[:2], few[2:]],
        [image[..., 0] for image in few],
        [Image.fromarray(image) for image in few],
        np.concatenate([few, np.full_like(few[..., :1], 255)], axis=3),
        np.concatenate([few / 255, np.ones_like(few[..., :1])], axis=3),
        few / 255 * np.float32(1 + 1e-6),
    ):
        np.testing.assert_allclose(model.predict(same).probabilities, expected, atol=1e-5)


def test_what_is_transparent_is_white(model, images):
    white, hidden = images[:1].copy(), np.concatenate([images[:1], np.full_like(images[:1, ..., :1], 255)], axis=3)
    white[:, :4], hidden[:, :4, :, 3] = 255, 0
    for same in (hidden, hidden / 255, Image.fromarray(hidden[0])):
        np.testing.assert_allclose(model.logits(same), model.logits(white), atol=1e-4)


def test_two_views_average_the_logits_of_an_image_and_its_mirror(model, images):
    few = images[:6]
    expected = (model.logits(few) + model.logits(few[:, :, ::-1])) / 2
    np.testing.assert_allclose(model.logits(few, views=2), expected, atol=1e-5)
    both = [model.predict(view, views=2).probabilities for view in (few, few[:, :, ::-1])]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_six_views_also_average_those_of_both_moved_by_a_pixel(model, images):
    few = images[:6]
    bordered = np.pad(few, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
    weights = {(1, 1): 1 / 4, (0, 0): 1 / 8, (2, 2): 1 / 8}
    expected = np.zeros((6, 10))
    for (y, x), weight in weights.items():
        moved = bordered[:, y : y + 8, x : x + 8]
        expected += weight * (model.logits(moved) + model.logits(moved[:, :, ::-1]))
    np.testing.assert_allclose(model.logits(few, views=6), expected, atol=1e-5)
    assert np.abs(expected - model.logits(few, views=2)).max() > 1e-3


@pytest.mark.parametrize("views", [0, 3, -1, True])
def test_another_number_of_views_is_refused(model, images, views):
    for few in (images[:2], []):
        with pytest.raises(ValueError, match=f"views must be 1, 2 or 6, got {views}"):
            model.predict(few, views)


@pytest.mark.parametrize("shape", [(16, 16), (24, 9), (9, 24), (3, 5), (8, 40)])
def test_other_sizes_are_scaled_to_cover_and_cut_at_the_centre(model, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    height, width = shape
    scale = 8 / min(shape)
    scaled = Image.fromarray(image).resize(
        (max(8, round(width * scale)), max(8, round(height * scale))), Image.BILINEAR
    )
    left, top = (scaled.width - 8) // 2, (scaled.height - 8) // 2
    expected = np.asarray(scaled)[top : top + 8, left : left + 8]
    assert (trained_model.as_batch(image, SHAPE) == expected[None]).all()
    floats = trained_model.as_batch(image / 255, SHAPE)
    assert (
        np.abs(floats * 255 - expected).max() < 1.001
    )  # Pillow rounds bytes after each of its two passes, by 0.5 at most


# Which pixels matter


def test_saliency_is_the_size_of_the_likeliest_logits_gradient(model, images):
    pixels = images[:1].astype(np.float32)
    apply = models.from_config(model.config.model, 10).apply
    of_all = jax.jacrev(lambda x: steps.eval_logits(apply, model.variables, x, model.config.data)[0])(pixels)
    slopes = np.abs(of_all[model.predict(images[0]).labels[0], 0]).max(axis=2)
    found = model.saliency(images[0])
    assert found.shape == (1, 8, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], slopes / slopes.max(), atol=1e-4)


def test_saliency_of_a_network_whose_first_layer_is_not_trained(cache_dir):
    config = make_tiny_config(cache_dir)
    config.model.stem = "whitened"
    state = make_state(config, 10, SHAPE, 1.0, train_state.make_mesh(1))
    model = trained_model.Model(config, tuple("0123456789"), SHAPE, state.variables, 0)
    test_saliency_is_the_size_of_the_likeliest_logits_gradient(model, datasets.load(config.data).test.images)


def test_a_pixel_that_matters_more_changes_the_likeliest_logit_more(model, images):
    base = 0.25 + images[0] / np.float32(510)  # so that no change leaves 0..1
    step = np.float32(1e-3)
    changes = np.eye(base.size, dtype=np.float32).reshape(-1, *base.shape) * step
    likeliest = model.predict(base).labels[0]
    above, below = (model.logits(base + sign * changes)[:, likeliest] for sign in (1, -1))
    changed = np.abs(above - below).reshape(base.shape).max(axis=2)
    # Not equal: a step may cross a ReLU's kink, and logits of float32 differ by little.
    assert np.corrcoef(model.saliency(base)[0].ravel(), changed.ravel())[0, 1] > 0.99


def test_saliency_takes_what_predict_takes(model, images):
    few = images[:3]
    maps = model.saliency(few)
    assert maps.shape == (3, 8, 8)
    np.testing.assert_allclose(model.saliency([few[0], few[1:] / 255]), maps, atol=1e-4)
    assert model.saliency(few[:0]).shape == (0, 8, 8)
    assert model.saliency(np.zeros((20, 30, 3), np.uint8)).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="must be"):
        model.saliency(np.zeros(8, np.uint8))


def test_no_images_give_no_predictions(model, images):
    for none in ([], images[:0]):
        predictions = model.predict(none)
        assert predictions.probabilities.shape == (0, 10)
        assert (predictions.labels.shape, predictions.names) == ((0,), [])


# Mistakes


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros(8, np.uint8), "must be"),
        (np.zeros((2, 8, 8, 2), np.uint8), "with C 3, 4 or 1"),
        (np.zeros((0, 0, 3), np.uint8), "must be"),
        (np.full((8, 8, 3), 255.0), "have values from 255 to 255: they must be in 0..1, or uint8"),
        (np.full((8, 8, 3), np.nan), "must be in 0..1"),
        (np.full((8, 8, 3), 1e300), "have values from 1e\\+300 to 1e\\+300"),
        (np.zeros((8, 8, 3), np.int64), "images are int64: they must be uint8 in 0..255 or floats in 0..1"),
        ("cat.png", "must be"),
        ([np.zeros(8)], "must be"),
        (np.full((8, 8, 3), 1.0001), "must be in 0..1"),
        (np.zeros((1, 1001, 3), np.uint8), "one side may be at most 1000 times as long as the other"),
        (None, "must be"),
    ],
)
def test_what_is_no_image_is_refused(model, images, words):
    with pytest.raises(ValueError, match=words):
        model.predict(images)


def test_logits_take_what_predict_takes(model, images):
    np.testing.assert_allclose(model.logits([*images[:3]]), model.logits(images[:3] / 255), atol=1e-4)
    with pytest.raises(ValueError, match="images are int64: they must be uint8"):
        model.logits(images[:3].astype(int))


def test_any_checkpoint_can_be_loaded(run):
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    assert {trained_model.load(run, step).step for step in steps} == set(steps)
    assert trained_model.load(str(run), "latest").step == steps[-1]


def test_loading_leaves_the_callers_logging_as_it_is(run):
    before = logging.get_verbosity()
    try:
        for verbosity in (logging.DEBUG, logging.FATAL):
            logging.set_verbosity(verbosity)
            trained_model.load(run)
            assert logging.get_verbosity() == verbosity
    finally:
        logging.set_verbosity(before)


def test_the_parameters_are_those_of_the_checkpoint(run, model, cache_dir):
    _, state, step = restore_run(make_tiny_config(cache_dir), run, "best")
    assert step == model.step
    jax.tree.map(
        np.testing.assert_array_equal, model.variables, {"params": state.params, "batch_stats": state.batch_stats}
    )


@pytest.mark.parametrize(
    ("checkpoint", "words"), [("7", "no checkpoint of step 7"), ("newest", "must be best, latest or a step")]
)
def test_a_checkpoint_that_is_not_there_is_refused(run, checkpoint, words):
    with pytest.raises(UserError, match=words):
        trained_model.load(run, checkpoint)


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no run with checkpoints: give the workdir of a run"):
            trained_model.load(path)


THREE_LINES = """
import sys
import numpy as np
from resnet_jax import load
model = load(sys.argv[1])
print(model.predict(np.zeros((1, 8, 8, 3), np.uint8)).names)
loaded = [name for name in ("tensorflow", "tensorflow_datasets") if name in sys.modules]
assert not loaded, loaded
"""


def test_it_takes_three_lines_and_no_tensorflow(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", THREE_LINES, str(run)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("['")


def test_the_package_gives_nothing_else():
    assert set(resnet_jax.__all__) == {"Model", "__version__", "load", "train"}
    assert resnet_jax.load is trained_model.load
    with pytest.raises(AttributeError, match="has no attribute 'lead'"):
        resnet_jax.lead  # noqa: B018


@pytest.mark.parametrize("use", ["predict", "saliency"])
def test_a_forked_process_says_what_to_do_and_does_not_hang(model, images, use):
    model.predict(images[:1])
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of the fork
        child = os.fork()
    if not child:
        try:
            getattr(model, use)(images[:1])
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert b"JAX does not survive a fork: load the network in each process" in os.read(reader, 1000)
    os.close(reader)


COUNT_COMPILATIONS = """
import sys
import jax
import numpy as np
from resnet_jax import load

misses, hits = [], []
jax.monitoring.register_event_listener(
    lambda event, **_: {"/jax/compilation_cache/cache_misses": misses, "/jax/compilation_cache/cache_hits": hits}.get(event, []).append(event)
)
load(sys.argv[1]).predict(np.zeros((1, 32, 32, 3), np.uint8))
print(len(misses), len(hits))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", COUNT_COMPILATIONS, "final-cifar10"]
    first, second = (subprocess.run(command, env=env, check=True, capture_output=True, text=True) for _ in range(2))
    compiled, found = map(int, first.stdout.split())
    assert compiled > 0
    assert second.stdout.split() == ["0", str(compiled + found)]
