import gc
import itertools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax
import numpy as np
import pytest
from helpers import make_state, make_tiny_config
from jax.sharding import Mesh

from resnet_jax import train_state
from resnet_jax.errors import UserError
from resnet_jax.runs.checkpoints import Checkpoints, CorruptCheckpointError, read_chosen
from resnet_jax.runs.metrics_log import Validation


@pytest.fixture(scope="module")
def state(cache_dir):
    return make_state(make_tiny_config(cache_dir), 10, (8, 8, 3), 20.0, train_state.make_mesh())


def save_all(directory, state, results):
    """Save a checkpoint per validation result, at steps 1, 2, ...; the step is also added to every parameter."""
    validations = {}
    checkpoints = Checkpoints(directory, validations)
    for step, accuracy in enumerate(results, start=1):
        checkpoints.save(plus(state, step), {"seconds": step})
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
        assert meta == {"seconds": 1, "digest": train_state.digest(expected)}
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
    with pytest.raises(RuntimeError, match="did not save step 1"):
        checkpoints.save(plus(state, 1), {})
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


@pytest.fixture
def collect():
    """Let what Orbax leaves behind be collected inside the test that made it."""
    yield
    gc.collect()


def orbax_drops_its_tasks(test):
    """Orbax abandons the tasks of a restore that failed, and Python warns of them as it collects them."""
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    return pytest.mark.usefixtures("collect")(ignore(test))


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


@orbax_drops_its_tasks
def test_a_flipped_bit_of_the_metadata_is_noticed_or_changes_nothing(tmp_path, state):
    meta = {"seconds": 1.5, "class_names": ["cat", "dog"], "mean": [0.4914, 0.4822, 0.4465]}
    with closing(Checkpoints(tmp_path, {})) as checkpoints:
        checkpoints.save(plus(state, 1), meta)
        checkpoints.wait()
    file, rng, noticed = tmp_path / "1" / "meta" / "metadata", np.random.default_rng(0), 0
    content = file.read_bytes()
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        whole = checkpoints.meta(1)
        assert whole == meta | {"digest": train_state.digest(plus(state, 1))}
        for _ in range(200):
            flip_a_bit(file, rng)
            try:
                found = checkpoints.meta(1)
            except CorruptCheckpointError:
                noticed += 1
            else:  # in the name under which its digest is kept, or in a space
                assert {name: found[name] for name in whole} == whole
            file.write_bytes(content)
    assert noticed > 150


@orbax_drops_its_tasks
def test_a_newest_checkpoint_with_damaged_metadata_is_set_aside(tmp_path, state):
    """Without a digest, a changed config looked like another run's, and nothing resumed."""
    directory = tmp_path / "checkpoints"
    save_all(directory, state, [0.5, 0.6]).close()
    file = directory / "2" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"seconds": 2', '"seconds": 3'))

    def one_of_the_run(meta):
        if meta["seconds"] not in (1, 2):
            raise UserError("another config")

    with closing(Checkpoints(directory, {})) as checkpoints:
        restored, meta = checkpoints.restore_newest(state, one_of_the_run)
    assert int(restored.step) == meta["seconds"] == 1
    assert [path.name[:2] for path in (tmp_path / "damaged").iterdir()] == ["2-"]


@orbax_drops_its_tasks
def test_metadata_without_a_digest_of_their_own_are_those_of_an_older_version(tmp_path, state):
    save_all(tmp_path, state, [0.5]).close()
    file = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["meta_digest"]
    file.write_text(json.dumps(meta))
    with closing(Checkpoints(tmp_path, {}, read_only=True)) as checkpoints:
        assert checkpoints.restore(1, state, accept)[1] == meta


def test_a_checkpoint_is_read_while_its_run_replaces_it(tmp_path, state):
    """The run saves as often as it can; each reading takes longer than that, and still none calls a checkpoint damaged."""
    stop = threading.Event()

    def run():
        with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
            for step in itertools.count(2):
                checkpoints.save(plus(state, step), {"seconds": step})
                checkpoints.wait()
                if stop.is_set():
                    return

    save_all(tmp_path / "checkpoints", state, [None]).close()
    with ThreadPoolExecutor(1) as executor:
        writer = executor.submit(run)
        try:
            for _ in range(20):
                restored, step = read_chosen(
                    tmp_path, "latest", lambda found, step: found.restore(step, state, accept)[0]
                )
                assert int(restored.step) == step
        finally:
            stop.set()
        writer.result()
    assert step > 2


@orbax_drops_its_tasks
def test_a_checkpoint_that_stays_damaged_is_told(tmp_path, state):
    save_all(tmp_path / "checkpoints", state, [0.5]).close()
    DAMAGE["no meta"](tmp_path / "checkpoints" / "1")
    tried = []

    def read(found, step):
        tried.append(step)
        return found.restore(step, state, accept)

    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        read_chosen(tmp_path, "latest", read)
    assert tried == [1] * 5


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
        checkpoints.save(plus(state, 3), {"seconds": 3})
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
