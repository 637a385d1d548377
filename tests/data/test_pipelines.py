import functools
import os
import pickle
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import tensorflow as tf
from helpers import ROOT

from resnet_jax import train_state
from resnet_jax.data import augment_jax, augment_tf, pipelines, sampling
from resnet_jax.data.datasets import Split
from resnet_jax.errors import UserError
from resnet_jax.host import usable_cores


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (100, 16, 16, 3), np.uint8), rng.integers(0, 10, 100, np.int32))


@pytest.fixture
def config(final_config):
    final_config.batch_size = 24  # does not divide the 100 examples
    return final_config


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert np.array_equal(ours[name], theirs[name]), name


def test_a_batch_holds_the_sampled_examples_augmented(split, config):
    (batch,) = pipelines.train_batches(split, config, 7, 8)
    where = (config.seed, 7 * 24, 8 * 24, 100)
    chosen, draws = sampling.indices(*where), sampling.augment_draws(*where, config.augment, (16, 16))
    expected = augment_tf.augment(tf.constant(split.images), tf.constant(chosen), draws, config.augment)
    assert_equal(batch, {"images": expected.numpy(), "labels": split.labels[chosen]})


# Every ingredient that is not in the report, as fields of `config.augment`.
INGREDIENTS = [
    {},
    {"policy": "cifar10"},
    {"policy": "trivial"},
    {"policy": "rand-m9-n3"},
    {"flip": "alternating", "crop_fill": "reflect"},
    {"cutout": 5},
    {"resized_crop_area": 0.08, "crop_padding": 0},
    {"mixup_alpha": 0.2},
    {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
]
every_ingredient = pytest.mark.parametrize("fields", INGREDIENTS, ids=str)


@pytest.mark.parametrize("start", [0, 3, 11])  # steps 4, 8 and 12 end an epoch, 96 of whose 100 examples they begin in
@every_ingredient
def test_both_pipelines_give_the_same_batches(split, config, start, fields):
    config.augment.update(fields)
    streamed = list(pipelines.train_batches(split, config, start, start + 6))
    build_batch = jax.jit(functools.partial(augment_jax.build_batch, config=config.augment))
    draws = pipelines.train_draws(split, config, start, 6)
    for step, batch in enumerate(streamed):
        on_device = build_batch(split._asdict(), {name: drawn[step] for name, drawn in draws.items()})
        assert_equal(jax.device_get(on_device), batch)


@pytest.mark.parametrize("processes", [2, 4])
@every_ingredient
def test_the_draws_of_processes_make_up_those_of_the_batches(split, config, processes, fields):
    config.augment.update(fields)
    whole = pipelines.train_draws(split, config, 2, 5)
    parts = [pipelines.train_draws(split, config, 2, 5, i, processes) for i in range(processes)]
    assert_equal({name: np.concatenate([part[name] for part in parts], axis=1) for name in whole}, whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": 16, "crop_fill": "reflect"}, "crop_padding 16 is not less than the 16 pixels that"),
        ({"cutout": 17}, "cutout 17 is larger than the images' 16 pixels: reduce it"),
    ],
)
def test_images_too_small_for_the_augmentation_are_refused(split, config, fields, message):
    config.augment.update({"crop_padding": 15, "crop_fill": "reflect", "cutout": 16})
    pipelines.check(config, split, train_state.make_mesh(1))
    config.augment.update(fields)
    with pytest.raises(UserError, match=message) as refused:
        pipelines.check(config, split, train_state.make_mesh(1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", pipelines._IN_INT32)
def test_images_too_large_for_the_augmentation_are_refused(config, name):
    def check(side):
        images = np.broadcast_to(np.uint8(0), (2, 8, side, 3))
        pipelines.check(config, Split(images, np.zeros(2, np.int32)), train_state.make_mesh(1))

    for other in pipelines._IN_INT32:
        config.augment[other] = type(config.augment[other])()
    check(4097)
    config.augment[name] = "trivial" if name == "policy" else 0.5
    check(4096)
    with pytest.raises(UserError, match=rf"a side of 4097 pixels, and config.augment.{name} takes up to 4096: set"):
        check(4097)


@pytest.mark.parametrize("images", [1, 4])
def test_a_part_of_a_batch_with_one_image_cannot_be_mixed(split, config, images):
    config.batch_size, config.accumulation_steps, config.augment.mixup_alpha = images, images, 0.2
    with pytest.raises(
        UserError, match=f"batch_size {images} leaves one image in each of config.accumulation_steps {images} parts"
    ):
        pipelines.check(config, split, train_state.make_mesh(1))


@every_ingredient
def test_the_shapes_of_a_batch_are_those_of_the_stream(split, config, fields):
    config.augment.update(fields)
    (batch,) = pipelines.train_batches(split, config, 0, 1)
    shapes = pipelines.batch_shapes(split, config)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }


def test_free_memory_is_that_of_the_fullest_device(split):
    def device(in_use):
        return types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100_000, "bytes_in_use": in_use})

    def mesh(*in_use):
        return types.SimpleNamespace(local_devices=[device(bytes_in_use) for bytes_in_use in in_use])

    pipelines.check_fits(split, mesh(0, 22_800))
    with pytest.raises(UserError, match="needs 77,200 bytes for the training images, but 77,199 are free: set it to"):
        pipelines.check_fits(split, mesh(0, 22_801))


@pytest.mark.parametrize(
    ("platform", "free", "meant"),
    [
        ("cpu", None, ("float32", "tf_data")),
        ("gpu", 2 * 77_200, ("bfloat16", "device")),
        ("tpu", 2 * 77_200 - 1, ("bfloat16", "tf_data")),
    ],
)
def test_auto_stands_for_what_suits_the_devices(split, config, platform, free, meant, monkeypatch):
    stats = {"bytes_limit": free, "bytes_in_use": 0} if free else None
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(local_devices=[device], devices=np.array([device]))
    config.model.dtype = config.pipeline = "auto"
    on_devices = pipelines.prefers_devices(split, mesh)
    taken = pipelines.without_auto(config, mesh, on_devices)
    assert (taken.model.dtype, taken.pipeline) == meant
    assert pipelines.without_auto(taken, mesh, not on_devices) == taken
    monkeypatch.setattr(pipelines, "has_tensorflow", lambda: False)
    assert pipelines.prefers_devices(split, mesh)


@every_ingredient
def test_a_step_is_the_same_wherever_the_stream_starts(split, config, fields):
    config.augment.update(fields)
    whole = list(pipelines.train_batches(split, config, 0, 12))
    assert len(whole) == 12
    for start in (1, 4, 5, 11):
        for ours, theirs in zip(pipelines.train_batches(split, config, start, 12), whole[start:], strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("processes", [2, 4])
@every_ingredient
def test_the_slices_of_processes_make_up_the_batch(split, config, processes, fields):
    config.augment.update(fields)
    whole = list(pipelines.train_batches(split, config, 3, 6))
    parts = [list(pipelines.train_batches(split, config, 3, 6, i, processes)) for i in range(processes)]
    for step, batch in enumerate(whole):
        assert_equal({name: np.concatenate([part[step][name] for part in parts]) for name in batch}, batch)


def test_two_runs_of_a_seed_are_equal_and_another_seed_is_not(split, config):
    (first,), (again,) = (list(pipelines.train_batches(split, config, 2, 3)) for _ in range(2))
    assert_equal(first, again)
    config.seed = 1
    (other,) = pipelines.train_batches(split, config, 2, 3)
    assert not np.array_equal(first["labels"], other["labels"])


def test_the_stream_starts_at_any_step_in_well_under_a_second(config):
    big = Split(np.zeros((50_000, 32, 32, 3), np.uint8), np.zeros(50_000, np.int32))
    next(pipelines.train_batches(big, config, 0, 1))  # TensorFlow's own first-time costs

    def first_batch(step):
        start = time.perf_counter()
        next(pipelines.train_batches(big, config, step, step + 1))
        return time.perf_counter() - start

    early, late = (min(first_batch(step) for _ in range(3)) for step in (1, 1_000_000))
    assert late < 2 * early + 0.2


@pytest.mark.parametrize("batch_size", [1, 7, 50, 100, 128])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_covers_every_example_once(split, batch_size, processes):
    batch_size *= processes
    seen = []
    for index in range(processes):
        batches = list(pipelines.eval_batches(split, batch_size, index, processes))
        assert {len(b["labels"]) for b in batches} == {batch_size // processes}
        seen += [
            (image.tobytes(), label)
            for b in batches
            for image, label in zip(b["images"][b["mask"]], b["labels"][b["mask"]], strict=True)
        ]
    assert sorted(seen) == sorted((image.tobytes(), label) for image, label in zip(*split, strict=True))


def test_tensorflow_takes_the_threads_it_is_given_and_those_it_has_when_it_runs(split, config):
    """In its own process, because TensorFlow makes its threads once: the second pipeline asks for others and uses those."""
    script = """
import sys, pickle, hashlib
from resnet_jax.data import pipelines
split, config = pickle.load(sys.stdin.buffer)
seen = set()
for config.data.num_threads in (1, 3, 0):
    (batch,) = pipelines.train_batches(split, config, 7, 8)
    seen.add(hashlib.sha256(batch["images"].tobytes()).hexdigest())
import tensorflow as tf
threading = tf.config.threading
print(len(seen), threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps((split, config)), cwd=ROOT, capture_output=True
    )
    assert done.stdout.split() == [b"1", b"1", b"1"], done.stderr


def test_tensorflow_may_use_the_cores_that_this_process_may(monkeypatch):
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()


def test_tensorflow_sees_no_gpu(split, config):
    next(pipelines.train_batches(split, config, 0, 1))
    assert tf.config.get_visible_devices("GPU") == []
