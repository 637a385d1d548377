import hashlib
from typing import NamedTuple

import jax
import numpy as np
import pytest

from resnet_jax import train_state


def create(config):
    return train_state.create(config, 10, (8, 8, 3), 20.0, train_state.make_mesh())


def test_a_seed_gives_the_same_parameters_and_another_gives_others(tiny_config):
    first, again = create(tiny_config), create(tiny_config)
    assert train_state.digest(first) == train_state.digest(again)
    tiny_config.seed = 1
    assert train_state.digest(create(tiny_config)) != train_state.digest(first)


def test_the_devices_of_a_mesh_are_in_the_order_of_the_processes(monkeypatch):
    """Each process builds the slice of a batch that has its number; a TPU pod may list its devices otherwise."""

    class Device(NamedTuple):
        process_index: int
        id: int

    listed = [Device(1, 0), Device(0, 3), Device(1, 1), Device(0, 2)]
    monkeypatch.setattr(train_state.jax, "devices", lambda: listed)
    monkeypatch.setattr(train_state, "Mesh", lambda devices, names: devices.tolist())
    assert train_state.make_mesh() == [[0, 2], [0, 3], [1, 0], [1, 1]]


def test_convolutions_start_as_he_et_al_say(tiny_config):
    tiny_config.model.channel_list = (64, 128)
    kernel = create(tiny_config).params["stage2_block1"]["conv2"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    assert abs(float(kernel.mean())) < 0.001


def test_parameters_equal_those_of_an_ordinary_init(tiny_config):
    state = create(tiny_config)
    module = state.apply_fn.__self__
    ordinary = module.init(jax.random.key(tiny_config.seed), np.zeros((1, 8, 8, 3), np.float32), train=False)
    lazy = {"params": state.params, "batch_stats": state.batch_stats}
    assert jax.tree.structure(lazy) == jax.tree.structure(ordinary)
    assert all(map(np.array_equal, jax.tree.leaves(lazy), jax.tree.leaves(ordinary)))


def test_the_digest_is_what_its_docstring_says(tiny_config):
    state = create(tiny_config)
    tree = train_state.trained(state)
    sha = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ):
        sha.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode() + np.asarray(leaf).tobytes())
    assert train_state.digest(tree) == sha.hexdigest()


@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state", "metrics", "step", "failed"])
def test_the_digest_sees_one_changed_number_anywhere(tiny_config, part):
    state = create(tiny_config)
    leaves, structure = jax.tree.flatten(getattr(state, part))
    flat = np.array(leaves[-1])
    last = flat.reshape(-1)[-1:]
    last[:] = np.nextafter(last, 9, dtype=flat.dtype) if flat.dtype.kind == "f" else last + 1
    changed = state.replace(**{part: jax.tree.unflatten(structure, [*leaves[:-1], flat])})
    assert train_state.digest(changed) != train_state.digest(state)


def test_what_is_trained_leaves_bookkeeping_out(tiny_config):
    state = create(tiny_config)
    later = state.replace(step=state.step + 1, metrics=jax.tree.map(lambda m: m + 1, state.metrics))
    assert train_state.digest(train_state.trained(later)) == train_state.digest(train_state.trained(state))
