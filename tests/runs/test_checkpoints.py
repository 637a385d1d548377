import itertools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_state, make_tiny_config, orbax_drops_its_tasks
from jax.sharding import Mesh

from resnet_jax import train_state
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import checkpoints as checkpoints_lib
from resnet_jax.runs.checkpoints import Checkpoints, CorruptCheckpointError
from resnet_jax.runs.metrics_log import Validation

META = {
    "config": {"data": {"mean": [0.4914, 0.4822, 0.4465]}},
    "fingerprint": "0" * 64,
    "class_names": ["cat", "dog"],
    "image_shape": [8, 8, 3],
}


@pytest.fixture(scope="module")
def state(cache_dir):
    return make_state(make_tiny_config(cache_dir), 10, (8, 8, 3), 20.0, train_state.make_mesh())


def save_all(directory, state, results):
    """Save a checkpoint per validation result, at steps 1, 2, ...; the step is also added to every parameter."""
    validations = {}
    checkpoints = Checkpoints(directory, validations)
    for step, accuracy in enumerate(results, start=1):
        checkpoints.save(plus(state, step), {**META, "seconds": float(step)})
        if accuracy is not None:
            validations[step] = Validation(accuracy, 1 - accuracy)
    checkpoints.wait()
    return checkpoints


def plus(state, step):
    """A state of a later step, told apart by its parameters."""
    return state.replace(step=np.int32(step), params=jax.tree.map(lambda p: p + step, state.params))


def accept(meta):
    """Take a checkpoint whatever its meta holds."""
    assert meta["seconds"] >= 1


def kept(checkpoints):
    return sorted(checkpoints._manager.all_steps())


def test_the_best_and_the_latest_two_are_kept(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [0.5, 0.9, 0.8, 0.1, 0.7])
    assert kept(checkpoints) == [2, 4, 5]
    assert [checkpoints.choose(which) for which in ("best", "latest", "4")] == [2, 5, 4]
    checkpoints.close()


def test_checkpoints_without_validation_keep_the_latest_two_and_the_last_is_the_best(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [None] * 4)
    assert kept(checkpoints) == [3, 4]
    assert checkpoints.choose("best") == 4
    checkpoints.close()


def test_a_save_without_validation_between_does_not_cost_the_best(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [0.9, None, 0.3, None, None])
    assert kept(checkpoints) == [1, 4, 5]
    assert checkpoints.choose("best") == 1
    checkpoints.close()


def test_a_state_comes_back_bit_for_bit_on_any_number_of_devices(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [0.5])
    expected = plus(state, 1)
    for devices in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        like = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        restored, meta = checkpoints.restore(1, like, accept)
        assert {name: meta[name] for name in (*META, "seconds")} == {**META, "seconds": 1.0}
        assert int(restored.step) == 1
        assert train_state.digest(restored) == train_state.digest(expected)
        assert len(jax.tree.leaves(restored)[0].sharding.device_set) == devices
    checkpoints.close()


def test_another_process_finds_the_same_checkpoints(tmp_path, state):
    save_all(tmp_path, state, [0.5, 0.9, 0.8]).close()
    reader = Checkpoints(
        tmp_path, {step: Validation(accuracy, 1.0) for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.8))}, read_only=True
    )
    assert reader.choose("best") == 2
    assert reader.latest == 3
    reader.close()


def test_saving_a_step_that_is_not_later_is_an_error_and_not_silent(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [0.5, 0.6])
    with pytest.raises(ValueError, match="step 1 must be later than the latest, of step 2"):
        checkpoints.save(plus(state, 1), META)
    checkpoints.close()


def test_a_folder_that_is_replaced_before_a_save_begins_to_write_is_left_alone(tmp_path, state):
    """The digests are computed first, in the thread that writes."""

    def check():
        raise UserError("the run's folder was deleted")

    checkpoints = save_all(tmp_path, state, [0.5])
    checkpoints.save(plus(state, 2), {**META, "seconds": 2.0}, check)
    with pytest.raises(UserError, match="the run's folder was deleted"):
        checkpoints.wait()
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_save_returns_before_it_is_written_and_its_state_may_be_donated(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {})
    donated, write = threading.Event(), checkpoints._write

    def write_later(*arguments):
        assert donated.wait(600)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "_write", write_later)
    later = jax.tree.map(jnp.array, plus(state, 1))  # a copy: the other tests need `state`
    expected = train_state.digest(later)
    checkpoints.save(later, {**META, "seconds": 1.0})
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)(later)
    assert jax.tree.leaves(later.params)[0].is_deleted()
    donated.set()
    checkpoints.wait()
    assert train_state.digest(checkpoints.restore(1, state, accept)[0]) == expected
    checkpoints.close()


@pytest.mark.parametrize(
    ("which", "words"),
    [("7", "choose one of 1, 2"), ("-1", "must be best, latest or a step"), ("bset", "must be best, latest or a step")],
)
def test_a_checkpoint_that_is_not_there_is_named(tmp_path, state, which, words):
    checkpoints = save_all(tmp_path, state, [0.5, 0.6])
    with pytest.raises(UserError, match=words):
        checkpoints.choose(which)
    checkpoints.close()


def test_an_empty_folder_has_no_checkpoint_and_is_not_made_by_a_reader(tmp_path):
    reader = Checkpoints(tmp_path / "none", {}, read_only=True)
    assert reader.latest is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        reader.choose("best")
    reader.close()
    assert not (tmp_path / "none").exists()


def remove(path):
    shutil.rmtree(path)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_data(path):
    for file in path.rglob("d/*"):
        cut(file)


DAMAGE = {
    "no state": lambda step: remove(step / "state"),
    "no meta": lambda step: remove(step / "meta"),
    "truncated data": truncate_data,
    "meta of another form": lambda step: (step / "meta" / "metadata").write_text("[]"),
    "meta cut off": lambda step: (step / "meta" / "metadata").write_text('{"seco'),
    "no array data": lambda step: [remove(path) for path in step.rglob("d") if path.is_dir()],
    "array manifest cut off": lambda step: [cut(path) for path in step.rglob("manifest.ocdbt")],
    "array metadata cut off": lambda step: cut(step / "state" / "_METADATA"),
    "a pipe": lambda step: ((step / "meta" / "metadata").unlink(), os.mkfifo(step / "meta" / "metadata")),
    "an empty folder": lambda step: (remove(step), step.mkdir()),
}


@orbax_drops_its_tasks
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path, state, damage):
    save_all(tmp_path, state, [0.5]).close()
    damage(tmp_path / "1")
    with (
        closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints,
        pytest.raises(CorruptCheckpointError) as refusal,
    ):
        checkpoints.restore(1, state, accept)
    assert str(refusal.value).startswith(f"{tmp_path / '1'} is damaged")
    assert "\n" not in str(refusal.value)


@orbax_drops_its_tasks
def test_a_checkpoint_of_another_model_is_refused(tmp_path, state, tiny_config):
    save_all(tmp_path, state, [0.5]).close()
    tiny_config.model.channel_list = (8, 24)
    other = make_state(tiny_config, 10, (8, 8, 3), 20.0, train_state.make_mesh())
    with (
        closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints,
        pytest.raises(UserError, match="is damaged"),
    ):
        checkpoints.restore(1, other, accept)


def flip_a_bit(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


@orbax_drops_its_tasks
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, state):
    whole = tmp_path / "whole"
    save_all(whole, state, [0.5]).close()
    expected = train_state.digest(plus(state, 1))
    files = [file for file in (whole / "1").rglob("*") if file.is_file() and file.stat().st_size]
    data = max((file for file in files if file.parent.name == "d"), key=lambda file: file.stat().st_size)
    rng = np.random.default_rng(0)
    for trial, file in enumerate([*files, *[data] * 10]):  # parts of the data are not read, for Orbax merged them away
        copy = tmp_path / str(trial)
        shutil.copytree(whole, copy)
        flip_a_bit(copy / file.relative_to(whole), rng)
        try:
            with closing(Checkpoints(copy, {}, read_only=True)) as checkpoints:
                restored, _ = checkpoints.restore(1, state, accept)
        except CorruptCheckpointError:
            continue
        assert train_state.digest(restored) == expected, file


def sealed(meta):
    """A meta as a run saves it, with its digest."""
    unsealed = {name: value for name, value in meta.items() if name != "digest"}
    return {**unsealed, "digest": files.digest(unsealed)}


def rewrite_meta(step, change):
    """Replace the meta of a checkpoint by what `change` makes of it."""
    file = step / "meta" / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@orbax_drops_its_tasks
def test_a_flipped_bit_of_the_metadata_is_noticed_or_changes_nothing(tmp_path, state):
    save_all(tmp_path, state, [0.5]).close()
    file, rng, noticed = tmp_path / "1" / "meta" / "metadata", np.random.default_rng(0), 0
    content = file.read_bytes()
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        whole = checkpoints.meta(1)
        for _ in range(150):
            flip_a_bit(file, rng)
            try:
                assert checkpoints.meta(1) == whole  # a space became another one
            except CorruptCheckpointError:
                noticed += 1
            file.write_bytes(content)
    assert noticed > 120


def without(name):
    return lambda meta: {key: value for key, value in meta.items() if key != name}


BAD_META = {
    **{f"no {name}": without(name) for name in (*META, "seconds", "digests")},
    **{
        f"{name} is {value!r}": lambda meta, name=name, value=value: meta | {name: value}
        for name in (*META, "seconds", "digests")
        for value in (None, 7, [[]], {})
        if (name, value) != ("config", {})
    },
    "equal class names": lambda meta: meta | {"class_names": ["cat", "cat"]},
    "a class name is a number": lambda meta: meta | {"class_names": ["cat", 1]},
    "a side of 0 pixels": lambda meta: meta | {"image_shape": [0, 8, 3]},
    "an empty object": lambda meta: {},
    "the digest of a part is missing": lambda meta: meta | {"digests": without("params")(meta["digests"])},
}


@orbax_drops_its_tasks
def test_a_meta_that_lacks_a_key_or_holds_another_type_is_damaged_with_and_without_a_right_digest(tmp_path, state):
    save_all(tmp_path, state, [0.5]).close()
    file = tmp_path / "1" / "meta" / "metadata"
    content, accepted = file.read_bytes(), []
    changes = [
        *BAD_META.items(),
        *((f"sealed: {what}", lambda m, c=change: sealed(c(m))) for what, change in BAD_META.items()),
    ]
    changes += [
        ("no digest", without("digest")),
        ("digest of a number", lambda m: m | {"digest": 7}),
        ("a list", lambda m: [m]),
    ]
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        for what, change in changes:
            rewrite_meta(tmp_path / "1", change)
            with suppress(CorruptCheckpointError):
                checkpoints.restore(1, state)
                accepted.append(what)
            file.write_bytes(content)
    assert accepted == []


@orbax_drops_its_tasks
def test_a_newest_checkpoint_with_damaged_metadata_is_set_aside(tmp_path, state):
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.5, 0.6]).close()
    rewrite_meta(directory / "2", lambda meta: meta | {"fingerprint": "1" * 64})

    def refuse_others(meta):
        if meta["fingerprint"] != META["fingerprint"]:
            raise UserError("of other data")

    with closing(Checkpoints(directory, {})) as checkpoints:
        restored, _ = checkpoints.restore_newest(state, refuse_others)
    assert int(restored.step) == 1
    assert [path.name[:2] for path in (tmp_path / "damaged").iterdir()] == ["2-"]


def of_version_0_2(state, step):
    """Turn the meta of a checkpoint into that of version 0.2.0, which has one digest, of the state."""
    return lambda meta: without("digests")(meta) | {"digest": train_state.digest(plus(state, step))}


def test_a_checkpoint_of_version_0_2_is_read_and_checked_by_its_own_digest(tmp_path, state):
    save_all(tmp_path, state, [0.5, 0.6]).close()
    rewrite_meta(tmp_path / "1", of_version_0_2(state, 1))
    rewrite_meta(tmp_path / "2", of_version_0_2(state, 1))
    expected = train_state.digest(plus(state, 1).variables)
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        assert train_state.digest(checkpoints.restore(1, state, accept)[0].variables) == expected
        assert train_state.digest(checkpoints.restore_variables(1, state)) == expected
        with pytest.raises(CorruptCheckpointError, match="its state differs"):
            checkpoints.restore_variables(2, state)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_weights_alone_are_those_of_the_state_without_the_optimizers(tmp_path, tiny_config, ema_decay, monkeypatch):
    tiny_config.optim.ema_decay = ema_decay
    state = make_state(tiny_config, 10, (8, 8, 3), 20.0, train_state.make_mesh())
    save_all(tmp_path, state, [0.5]).close()
    digested, digest = [], train_state.digest
    monkeypatch.setattr(train_state, "digest", lambda tree: digested.append(jax.tree.structure(tree)) or digest(tree))
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        variables = checkpoints.restore_variables(1, state)
    assert digest(variables) == digest(plus(state, 1).variables)
    assert len(digested) == (2 if ema_decay else 3)  # the step, and the average or params and batch_stats
    assert jax.tree.structure(state.opt_state) not in digested


@orbax_drops_its_tasks
@pytest.mark.parametrize("part", ["params", "batch_stats", "step"])
def test_weights_that_differ_from_those_saved_are_noticed_and_other_parts_do_not_matter(tmp_path, state, part):
    save_all(tmp_path, state, [0.5]).close()

    def change(meta, name):
        return sealed(meta | {"digests": meta["digests"] | {name: "0" * 64}})

    rewrite_meta(tmp_path / "1", lambda meta: change(meta, "opt_state"))
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        checkpoints.restore_variables(1, state)
    rewrite_meta(tmp_path / "1", lambda meta: change(meta, part))
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints, pytest.raises(CorruptCheckpointError):
        checkpoints.restore_variables(1, state)


@orbax_drops_its_tasks
@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_checkpoint_is_read_while_its_run_replaces_it(tmp_path, state, which):
    """The run saves as often as it can; a reader never calls a checkpoint damaged that was only replaced."""
    directory, stop = tmp_path / "checkpoints", threading.Event()

    def run():
        validated = {}
        with closing(Checkpoints(directory, validated)) as checkpoints, (tmp_path / "metrics.jsonl").open("w") as log:
            for step in itertools.count(2):
                checkpoints.save(plus(state, step), {**META, "seconds": float(step)})
                checkpoints.wait()
                row = {"step": step, "split": "validation", "accuracy": 1 - 1 / step, "loss": 1 / step}
                validated[step] = Validation.of(row)
                print(json.dumps(row), file=log, flush=True)
                if stop.is_set():
                    return

    save_all(directory, state, [None]).close()
    with ThreadPoolExecutor(1) as executor:
        writer = executor.submit(run)
        try:
            for _ in range(10):
                restored, step = checkpoints_lib.read_chosen(
                    tmp_path, which, lambda saved, step: saved.restore(step, state, accept)[0]
                )
                assert int(restored.step) == step
        finally:
            stop.set()
        writer.result()
    assert step > 2


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_called_damaged_and_another_is_chosen(tmp_path, state):
    directory, tried = tmp_path / "checkpoints", []
    save_all(directory, state, [0.5, 0.6]).close()

    def reader(saved, step):
        tried.append(step)
        if step == 2:
            shutil.rmtree(directory / "2")
        return int(saved.restore(step, state)[0].step)

    assert checkpoints_lib.read_chosen(tmp_path, "latest", reader) == (1, 1)
    assert tried == [2, 1]
    with pytest.raises(UserError, match="holds no checkpoint of step 2: choose one of 1"):
        checkpoints_lib.read_chosen(tmp_path, "2", reader)


def test_the_best_is_chosen_again_if_a_validation_ends_meanwhile(tmp_path, state, monkeypatch):
    save_all(tmp_path / "checkpoints", state, [0.5, 0.6]).close()
    answers = iter([{1: Validation(0.5, 1.0)}, *[{2: Validation(0.6, 0.9)}] * 3])
    monkeypatch.setattr(checkpoints_lib, "validations", lambda directory: next(answers))
    assert checkpoints_lib.read_chosen(tmp_path, "best", lambda saved, step: None) == (None, 2)


@orbax_drops_its_tasks
def test_a_checkpoint_that_stays_damaged_is_named_at_once(tmp_path, state):
    save_all(tmp_path / "checkpoints", state, [0.5]).close()
    DAMAGE["no meta"](tmp_path / "checkpoints" / "1")
    tried = []
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        checkpoints_lib.read_chosen(
            tmp_path, "latest", lambda saved, step: tried.append(step) or saved.restore(step, state)
        )
    assert tried == [1]


def test_checkpoints_that_are_replaced_faster_than_they_are_read_are_one_line(tmp_path, state):
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.5]).close()
    names = itertools.count()

    def reader(saved, step):
        (directory / "1" / str(next(names))).touch()
        raise CorruptCheckpointError("1 is damaged")

    with pytest.raises(UserError, match="replaced faster than they can be read") as refusal:
        checkpoints_lib.read_chosen(tmp_path, "latest", reader)
    assert not isinstance(refusal.value, CorruptCheckpointError)


def test_a_state_that_orbax_restores_in_silence_but_is_not_the_one_saved_is_noticed(tmp_path, state, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "digest", lambda state: "0" * 64)
        save_all(tmp_path, state, [0.5]).close()
    with (
        closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints,
        pytest.raises(CorruptCheckpointError, match="its state differs from the one that was saved"),
    ):
        checkpoints.restore(1, state, accept)


@orbax_drops_its_tasks
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_whole_checkpoint_is_restored_and_damaged_ones_moved_aside(tmp_path, state, damage, capsys):
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.9, 0.5, 0.6]).close()
    damage(directory / "3")
    (directory / "4.orbax-checkpoint-tmp").mkdir()
    with closing(Checkpoints(directory, {1: Validation(0.9, 1.0), 2: Validation(0.5, 1.0)})) as checkpoints:
        restored, meta = checkpoints.restore_newest(state, accept)
        assert int(restored.step) == meta["seconds"] == 2
        assert kept(checkpoints) == [1, 2]
        checkpoints.save(plus(state, 3), {**META, "seconds": 3.0})
        checkpoints.wait()
        assert kept(checkpoints) == [1, 2, 3]
    (moved,) = (tmp_path / "damaged").iterdir()
    assert moved.name.startswith("3-")
    assert f"{directory / '3'} is damaged" in capsys.readouterr().err


@orbax_drops_its_tasks
def test_where_no_checkpoint_is_whole_all_stay(tmp_path, state):
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.5, 0.6]).close()
    for step in "12":
        DAMAGE["no state"](directory / step)
    with (
        closing(Checkpoints(directory, {})) as checkpoints,
        pytest.raises(CorruptCheckpointError, match=r"no checkpoint of .* is intact"),
    ):
        checkpoints.restore_newest(state, accept)
    assert {"1", "2"} <= {p.name for p in directory.iterdir()}
    assert not (tmp_path / "damaged").exists()


def test_a_checkpoint_of_another_run_is_refused_and_not_taken_for_damaged(tmp_path, state):
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.5, 0.6]).close()

    def refuse(meta):
        raise UserError("of another run")

    with (
        closing(Checkpoints(directory, {})) as checkpoints,
        pytest.raises(UserError, match="of another run") as refusal,
    ):
        checkpoints.restore_newest(state, refuse)
    assert not isinstance(refusal.value, CorruptCheckpointError)
    assert not (tmp_path / "damaged").exists()


def test_a_step_of_thousands_of_digits_is_no_checkpoint(tmp_path, state):
    checkpoints = save_all(tmp_path, state, [0.5])
    with pytest.raises(UserError, match="holds no checkpoint of step 111"):
        checkpoints.choose("1" * 5000)
    checkpoints.close()
