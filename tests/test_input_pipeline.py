import time

import numpy as np
import pytest
import tensorflow as tf

from resnet_jax import augment_tf, input_pipeline, sampling
from resnet_jax.datasets import Split


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
    (batch,) = input_pipeline.train_batches(split, config, 7, 8)
    where = (config.seed, 7 * 24, 8 * 24, 100)
    chosen, draws = sampling.indices(*where), sampling.draws(*where, config.augment, (16, 16))
    expected = augment_tf.augment(tf.constant(split.images), tf.constant(chosen), draws._asdict(), config.augment)
    assert_equal(batch, {"images": expected.numpy(), "labels": split.labels[chosen]})


def test_a_step_is_the_same_wherever_the_stream_starts(split, config):
    whole = list(input_pipeline.train_batches(split, config, 0, 12))
    assert len(whole) == 12
    for start in (1, 4, 5, 11):
        for ours, theirs in zip(input_pipeline.train_batches(split, config, start, 12), whole[start:], strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_processes_make_up_the_batch(split, config, processes):
    whole = list(input_pipeline.train_batches(split, config, 3, 6))
    parts = [list(input_pipeline.train_batches(split, config, 3, 6, i, processes)) for i in range(processes)]
    for step, batch in enumerate(whole):
        assert_equal({name: np.concatenate([part[step][name] for part in parts]) for name in batch}, batch)


def test_two_runs_of_a_seed_are_equal_and_another_seed_is_not(split, config):
    (first,), (again,) = (list(input_pipeline.train_batches(split, config, 2, 3)) for _ in range(2))
    assert_equal(first, again)
    config.seed = 1
    (other,) = input_pipeline.train_batches(split, config, 2, 3)
    assert not np.array_equal(first["labels"], other["labels"])


def test_the_stream_starts_at_any_step_in_well_under_a_second(config):
    big = Split(np.zeros((50_000, 32, 32, 3), np.uint8), np.zeros(50_000, np.int32))
    next(input_pipeline.train_batches(big, config, 0, 1))  # TensorFlow's own first-time costs

    def first_batch(step):
        start = time.perf_counter()
        next(input_pipeline.train_batches(big, config, step, step + 1))
        return time.perf_counter() - start

    early, late = (min(first_batch(step) for _ in range(3)) for step in (1, 1_000_000))
    assert late < 2 * early + 0.2


@pytest.mark.parametrize("batch_size", [1, 7, 50, 100, 128])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_covers_every_example_once(split, batch_size, processes):
    batch_size *= processes
    seen = []
    for index in range(processes):
        batches = list(input_pipeline.eval_batches(split, batch_size, index, processes))
        assert {len(b["labels"]) for b in batches} == {batch_size // processes}
        seen += [
            (image.tobytes(), label)
            for b in batches
            for image, label in zip(b["images"][b["mask"]], b["labels"][b["mask"]], strict=True)
        ]
    assert sorted(seen) == sorted((image.tobytes(), label) for image, label in zip(*split, strict=True))


def test_tensorflow_sees_no_gpu(split, config):
    next(input_pipeline.train_batches(split, config, 0, 1))
    assert tf.config.get_visible_devices("GPU") == []
