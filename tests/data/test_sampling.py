import math
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.data import sampling

N = 1000

GOLDEN_INDICES = [47848, 34552, 24994, 32827, 31943, 24289]
GOLDEN_FLIP = [False, False, True]
GOLDEN_CROP = [[6, 6], [8, 6], [0, 7]]
GOLDEN_JITTER = [[4068, 4432, 3724], [4323, 3846, 4105], [4404, 4578, 3992]]  # times 4096
GOLDEN_ORDER = [[2, 0, 1], [0, 2, 1], [0, 1, 2]]
GOLDEN_ROTATION = [
    [65500, -2158, 66760, 2158, 65500, -123],
    [65052, 7952, -82986, -7952, 65052, 163534],
    [65350, 4929, -40756, -4929, 65350, 112046],
]
GOLDEN_ALTERNATING = "111110110101010001111110"
GOLDEN_CENTRES = [[4, 6], [3, 6], [4, 9]]
GOLDEN_CROPS = [[[3, 2359296], [2, 3670016]], [[3, 2359296], [5, 524288]]]  # of row 3 and column 4
GOLDEN_MIXING = [
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 4096.0, 0.0, 0.0],
    [0.0, 0.0, 4096.0, 4096.0],
    [2694.0, 2694.0, 4096.0, 4096.0],
]  # times 4096
GOLDEN_SPLIT = [2, 22, 36, 37, 44]


@pytest.fixture
def augment(final_config):
    return final_config.augment


def draws(augment, start, stop, seed=0, num_examples=N):
    return sampling.augment_draws(seed, start, stop, num_examples, augment, (32, 32))


def degrees(rotation):
    return np.degrees(np.arctan2(-rotation[:, 1], rotation[:, 0]))


def test_the_first_draws_are_pinned(augment):
    """If this fails, every run of every user changes: do not update it without saying so in the release."""
    assert sampling.indices(0, 0, 6, 50_000).tolist() == GOLDEN_INDICES
    d = draws(augment, 0, 3, num_examples=50_000)
    assert d["flip"].tolist() == GOLDEN_FLIP
    assert d["crop"].tolist() == GOLDEN_CROP
    assert (d["jitter"] * 4096).astype(int).tolist() == GOLDEN_JITTER
    assert d["order"].tolist() == GOLDEN_ORDER
    assert d["rotation"].tolist() == GOLDEN_ROTATION


def test_every_image_comes_once_an_epoch_across_batches_that_straddle_epochs():
    batch = 96  # does not divide N
    stream = np.concatenate([sampling.indices(3, s * batch, (s + 1) * batch, N) for s in range(40)])
    for epoch in range(3):
        assert sorted(stream[epoch * N : (epoch + 1) * N]) == list(range(N))


def test_a_batch_longer_than_an_epoch_is_the_same_stream():
    assert np.array_equal(
        sampling.indices(0, 5, 5 + 3 * N, N),
        np.concatenate([sampling.indices(0, i, i + 1, N) for i in range(5, 5 + 3 * N)]),
    )


def test_successive_epochs_and_seeds_are_uncorrelated():
    n = 50_000
    orders = [sampling.permutation(0, epoch, n) for epoch in range(6)] + [sampling.permutation(1, 0, n)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)  # 5 standard deviations
    # A fixed point is as rare as chance: one an epoch on average.
    assert max((a == b).sum() for i, a in enumerate(orders) for b in orders[:i]) < 10


def test_draws_are_a_function_of_position_alone(augment):
    whole = draws(augment, 0, 2500)
    parts = [draws(augment, a, b) for a, b in ((0, 1), (1, 700), (700, 1300), (1300, 2500))]
    assert set(whole) == {"flip", "crop", "jitter", "order", "rotation"}
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts])), name


def test_switching_one_augmentation_off_leaves_the_draws_of_the_others(augment):
    before = draws(augment, 0, 100)
    changed = ConfigDict(augment)
    changed.brightness = changed.flip_probability = changed.rotation_degrees = 0.0
    after = draws(changed, 0, 100)
    assert not after["flip"].any()
    assert (after["jitter"][:, 0] == 1.0).all()
    assert np.array_equal(after["jitter"][:, 1:], before["jitter"][:, 1:])
    assert np.array_equal(after["crop"], before["crop"])
    assert np.array_equal(after["order"], before["order"])
    assert after.keys() == before.keys() - {"rotation"}


def test_nothing_is_drawn_for_what_is_off(augment):
    off = {name: type(value)() for name, value in augment.items()}
    assert draws(ConfigDict(off), 0, 100) == {}
    drawn = {
        "flip_probability": {"flip", "crop"},
        "crop_padding": {"flip", "crop"},
        "brightness": {"jitter", "order"},
        "contrast": {"jitter", "order"},
        "saturation": {"jitter", "order"},
        "rotation_degrees": {"rotation"},
        "resized_crop_area": {"flip", "crop", "resized_crop"},
        "cutout": {"cutout"},
    }
    for name, names in drawn.items():
        on = ConfigDict(off | {name: type(off[name])(1)})
        assert draws(on, 0, 100).keys() == names, name


def test_each_draw_has_its_distribution(augment):
    n = 100_000
    d = draws(augment, 0, n, num_examples=n)
    assert abs(d["flip"].mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    for axis in range(2):
        counts = np.bincount(d["crop"][:, axis], minlength=9)
        assert len(counts) == 9
        assert np.abs(counts - n / 9).max() < 5 * np.sqrt(n / 9)
    assert (d["jitter"] * 4096 == np.round(d["jitter"] * 4096)).all()
    for kind in range(3):
        factor = d["jitter"][:, kind]
        assert factor.min() >= np.float32(0.8) - 1 / 4096
        assert factor.max() <= np.float32(1.2) + 1 / 4096
        assert abs(factor.mean() - 1.0) < 5 * (0.4 / np.sqrt(12)) / np.sqrt(n)
        assert abs(factor.std() - 0.4 / np.sqrt(12)) < 0.001
    orders, counts = np.unique(d["order"], axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(map(tuple, sampling.JITTER_ORDERS))
    assert np.abs(counts - n / 6).max() < 5 * np.sqrt(n / 6)
    angle = degrees(d["rotation"])
    assert np.abs(angle).max() <= 15.01
    assert np.abs(angle).max() > 14.9
    assert abs(angle.mean()) < 5 * (30 / np.sqrt(12)) / np.sqrt(n)
    assert abs(angle.std() - 30 / np.sqrt(12)) < 0.1


def test_draws_are_independent_of_each_other_of_the_next_image_and_of_the_next_epoch(augment):
    n = 20_000
    d = draws(augment, 0, 2 * n, num_examples=n)
    order = (d["order"] == np.array([[0, 1, 2]])).all(axis=1)
    columns = np.column_stack([d["flip"], d["crop"], d["jitter"], order, degrees(d["rotation"])]).astype(float)
    first, second = columns[:n], columns[n:]
    limit = 5.5 / np.sqrt(n)
    k = columns.shape[1]
    within = np.corrcoef(first.T)
    assert np.abs(within[~np.eye(k, dtype=bool)]).max() < limit
    assert np.abs(np.corrcoef(first[:-1].T, first[1:].T)[:k, k:]).max() < limit
    assert np.abs(np.corrcoef(first.T, second.T)[:k, k:]).max() < limit
    # nor do they depend on which image they fall on
    assert np.abs(np.corrcoef(sampling.permutation(0, 0, n), first.T)[0, 1:]).max() < limit


def test_alternating_flips_mirror_each_image_every_other_epoch(augment):
    augment.flip, augment.flip_probability = "alternating", 0.3
    n, epochs = 5000, 4
    d = draws(augment, 0, epochs * n, num_examples=n)
    of_image = np.empty((epochs, n), bool)
    for epoch in range(epochs):
        of_image[epoch, sampling.permutation(0, epoch, n)] = d["flip"][epoch * n : (epoch + 1) * n]
    assert abs(of_image[0].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / n)
    for epoch in range(1, epochs):
        assert np.array_equal(of_image[epoch], ~of_image[epoch - 1])
    assert not np.array_equal(of_image[0], draws(augment, 0, n, seed=1, num_examples=n)["flip"])


def test_alternating_flips_depend_on_position_alone_and_leave_the_other_draws(augment):
    before = draws(augment, 0, 2500)
    augment.flip = "alternating"
    whole = draws(augment, 0, 2500)
    parts = [draws(augment, a, b)["flip"] for a, b in ((0, 1), (1, 990), (990, 2500))]
    assert np.array_equal(whole["flip"], np.concatenate(parts))
    assert whole["flip"][:24].tolist() == [bit == "1" for bit in GOLDEN_ALTERNATING]
    for name in before.keys() - {"flip"}:
        assert np.array_equal(whole[name], before[name]), name


def test_a_flip_probability_of_0_switches_alternating_flips_off(augment):
    augment.flip, augment.flip_probability = "alternating", 0.0
    assert not draws(augment, 0, 3 * N)["flip"].any()


def test_the_centres_of_cutout_are_uniform_over_the_pixels_and_of_position_alone():
    n, shape = 50_000, (8, 12)
    whole = sampling.cutout_centres(0, 0, n, n, shape)
    for axis, side in enumerate(shape):
        counts = np.bincount(whole[:, axis], minlength=side)
        assert len(counts) == side
        assert np.abs(counts - n / side).max() < 5 * np.sqrt(n / side)
    assert abs(np.corrcoef(whole.T)[0, 1]) < 5 / np.sqrt(n)
    parts = [sampling.cutout_centres(0, a, b, N, shape) for a, b in ((0, 1), (1, 990), (990, 2500))]
    assert np.array_equal(sampling.cutout_centres(0, 0, 2500, N, shape), np.concatenate(parts))
    assert whole[:3].tolist() == GOLDEN_CENTRES


def torchvision_crop(uniforms, least_area, height, width):
    """`RandomResizedCrop.get_params` with these draws of area and ratio: (height, width), and whether it is in the centre."""
    for area, ratio in uniforms:
        target = height * width * (least_area + (1 - least_area) * area)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w, False
    if width / height < 3 / 4:
        return round(width / (3 / 4)), width, True
    if width / height > 4 / 3:
        return height, round(height * (4 / 3)), True
    return height, width, True


@pytest.mark.parametrize(
    ("shape", "least"), [((24, 24), 0.08), ((8, 30), 0.3), ((31, 9), 0.3), ((16, 12), 0.99), ((1, 1), 0.5)]
)
def test_resized_crops_are_torchvisions(shape, least):
    n = 2000
    crops = sampling.resized_crops(3, 0, n, n, least, shape)
    uniforms = sampling.uniform(sampling.random_bits(3, "resized_crop", 0, 0, 24 * n)).reshape(n, 24)
    centred = 0
    for crop, drawn in zip(crops, uniforms, strict=True):
        *size, is_centred = torchvision_crop(drawn[:20].reshape(10, 2), least, *shape)
        centred += is_centred
        for axis, places in enumerate(np.split(crop, [shape[0]])):
            side, length = shape[axis], size[axis]
            drawn_first = int(drawn[20 + axis] * (side - length + 1))
            first = (side - length) // 2 if is_centred else drawn_first
            within = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
            assert np.abs(places[:, 0] + places[:, 1] / 2**22 - (first + within)).max() < 1e-6
    assert 0 < centred < n or shape in ((24, 24), (1, 1))


def test_resized_crops_depend_on_the_position_alone():
    whole = sampling.resized_crops(0, 0, 2500, N, 0.08, (8, 12))
    parts = [sampling.resized_crops(0, a, b, N, 0.08, (8, 12)) for a, b in ((0, 1), (1, 990), (990, 2500))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole[:2, [3, 12]].tolist() == GOLDEN_CROPS


def mixing(augment, start, count, seed=0, shape=(8, 12), **alphas):
    augment.update(alphas)
    weights = sampling.mixing_weights(seed, start, count, augment, shape)
    assert weights.dtype == np.float32
    return weights[:, : shape[0]], weights[:, shape[0] :]


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 100])
def test_mixups_shares_are_of_the_beta_distribution(augment, alpha):
    n = 20_000
    rows, columns = mixing(augment, 0, n, mixup_alpha=alpha)
    assert (columns == 1).all()
    assert (rows == rows[:, :1]).all()
    share = rows[:, 0].astype(float)
    assert (share * 4096 == np.round(share * 4096)).all()
    deviation = 1 / np.sqrt(4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 5 * deviation / np.sqrt(n)
    assert abs(share.std() - deviation) < 0.02 * deviation
    assert 0 <= share.min() < share.max() <= 1


def test_cutmixs_box_is_that_of_the_papers_code(augment):
    n, (height, width) = 2000, (8, 12)
    rows, columns = mixing(augment, 0, n, cutmix_alpha=1.0)
    shares, _ = mixing(augment, 0, n, mixup_alpha=1.0, cutmix_alpha=0.0)  # the same draws of the shares
    bits = sampling.random_bits(0, "mix", 0, 0, 8 * n).reshape(n, 8)
    y, x = sampling.below(bits[:, 2], height), sampling.below(bits[:, 3], width)
    for i in range(n):
        ratio = np.sqrt(np.float64(shares[i, 0]))
        cut_height, cut_width = int(height * ratio), int(width * ratio)
        box = np.zeros((height, width))
        top, left = max(y[i] - cut_height // 2, 0), max(x[i] - cut_width // 2, 0)
        box[top : y[i] + cut_height // 2, left : x[i] + cut_width // 2] = 1
        assert np.array_equal(np.outer(rows[i], columns[i]), box)


def test_with_mixup_and_cutmix_each_step_draws_one_of_them(augment):
    n = 10_000
    rows, columns = mixing(augment, 0, n, mixup_alpha=1.0, cutmix_alpha=1.0)
    mixup = (columns == 1).all(axis=1) & (rows == rows[:, :1]).all(axis=1)
    assert abs(mixup.mean() - 0.5) < 5 * 0.5 / np.sqrt(n) + 0.01  # of CutMix's boxes, few are the whole image
    assert set(np.unique(rows[~mixup])) == {0, 1}


def test_the_first_mixing_weights_are_pinned_and_of_the_step_alone(augment):
    whole = np.concatenate(mixing(augment, 0, 100, mixup_alpha=0.2, cutmix_alpha=1.0), axis=1)
    parts = [np.concatenate(mixing(augment, a, b - a), axis=1) for a, b in ((0, 1), (1, 37), (37, 100))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert (whole[:4, [0, 7, 8, 19]] * 4096).tolist() == GOLDEN_MIXING
    assert not np.array_equal(whole, np.concatenate(mixing(augment, 0, 100, seed=1), axis=1))


def test_any_step_costs_one_epochs_permutation(augment):
    n, batch = 50_000, 128

    def cost(step):
        sampling.permutation.cache_clear()
        start = time.perf_counter()
        sampling.indices(0, step * batch, (step + 1) * batch, n)
        sampling.augment_draws(0, step * batch, (step + 1) * batch, n, augment, (32, 32))
        return time.perf_counter() - start

    early, late = (min(cost(step) for _ in range(5)) for step in (10, 10_000_000))
    assert late < 5 * early
    sampling.permutation.cache_clear()
    sampling.indices(0, 10_000_000 * batch, 10_000_001 * batch, n)
    assert sampling.permutation.cache_info().misses <= 2  # at most two epochs meet in a batch


def test_a_permutation_is_shared_and_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        sampling.permutation(0, 0, N)[0] = 1


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.333, 0.9])
def test_the_split_is_stratified_and_complete(ratio):
    labels = np.random.default_rng(0).choice(4, size=1003, p=[0.5, 0.3, 0.15, 0.05])
    first, second = sampling.stratified_split(labels, ratio, seed=7)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(1003))
    assert len(second) == round(ratio * 1003)
    counts = np.bincount(labels[second], minlength=4)
    assert np.abs(counts - ratio * np.bincount(labels)).max() < 1
    assert np.array_equal(second, np.sort(second))


def test_the_split_leaves_each_class_an_example_in_the_first_part():
    labels = np.array([0, 1, 2, 2, 3, 3, 3, 3])
    for ratio in (0.2, 0.5, 0.7, 0.9):
        first, second = sampling.stratified_split(labels, ratio, seed=0)
        assert set(labels[first]) == {0, 1, 2, 3}
        assert len(second) == min(round(ratio * 8), 4)  # of classes 0 and 1 none, of 2 one, of 3 three


def test_the_split_depends_on_its_seed_and_on_nothing_else():
    labels = np.arange(1000) % 10
    a, b, c = (sampling.stratified_split(labels, 0.1, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert a[:5].tolist() == GOLDEN_SPLIT
