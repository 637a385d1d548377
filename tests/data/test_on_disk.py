import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from resnet_jax import config as config_lib
from resnet_jax import training
from resnet_jax.data import datasets, memory, on_disk, pipelines, sources
from resnet_jax.data.on_disk import ImagesOnDisk
from resnet_jax.errors import UserError


@pytest.fixture
def data(final_config, tmp_path):
    """`config.data` of a folder of 60 noisy images of 6x8 pixels in two classes, 40 to train and 20 to test."""
    rng = np.random.default_rng(0)
    for i in range(60):
        part, label = "train" if i < 40 else "test", ("ant", "bee")[i % 2]
        file = tmp_path / "images" / part / label / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(file)
    final_config.data.name = f"folder:{tmp_path / 'images'}"
    final_config.data.cache_dir = str(tmp_path / "cache")
    return final_config.data


@contextlib.contextmanager
def little_memory(free=60 * 6 * 8 * 3):
    """Memory for all images once, but not for the copies that training makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free", lambda: free)
        yield


def forbid(*_):
    raise AssertionError("decoded again")


def stored_folder(data):
    (folder,) = Path(data.cache_dir).iterdir()
    return folder


def assert_same(ours, theirs):
    assert ours.fingerprint == theirs.fingerprint
    for a, b in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert a.images.shape == b.images.shape
        assert np.array_equal(a.images[:], b.images[:])
        assert np.array_equal(a.labels, b.labels)


def test_images_larger_than_the_memory_stay_on_disk_and_are_the_same(data, tmp_path, monkeypatch, capsys):
    in_memory = datasets.load(data)
    assert isinstance(in_memory.train.images, np.ndarray)
    data.cache_dir = str(tmp_path / "other")
    with little_memory():
        first = datasets.load(data)
        assert isinstance(first.train.images, ImagesOnDisk)
        assert isinstance(first.test.images, ImagesOnDisk)  # although the test images alone would fit
        said = (
            f"60 images take 0.0 GB and do not fit in memory three times: batches are read from {stored_folder(data)}"
        )
        assert said in capsys.readouterr().out
        assert_same(first, in_memory)
        monkeypatch.setattr(sources, "read_folder", forbid)
        again = datasets.load(data)
        assert said in capsys.readouterr().out
        assert isinstance(again.train.images, ImagesOnDisk)
        assert_same(again, in_memory)
    with_memory = datasets.load(data)
    assert isinstance(with_memory.train.images, np.ndarray)
    assert_same(with_memory, in_memory)


@pytest.mark.parametrize("times", [1, 2])
def test_decoded_images_that_no_longer_fit_are_decoded_to_disk(data, times):
    in_memory = datasets.load(data)
    with little_memory(times * 60 * 6 * 8 * 3):
        on_disk_now = datasets.load(data)
    assert isinstance(on_disk_now.train.images, ImagesOnDisk)
    assert_same(on_disk_now, in_memory)


@pytest.mark.parametrize("cached", ["nothing", "npz", "folder"])
def test_the_device_pipeline_has_the_images_in_memory_or_refuses_them(data, cached):
    expected = datasets.load(data)
    if cached != "npz":
        shutil.rmtree(data.cache_dir)
    if cached == "folder":
        with little_memory():
            datasets.load(data)
    with little_memory(2 * 60 * 6 * 8 * 3 + 10_000):
        in_memory = datasets.load(data, in_memory=True)
    assert isinstance(in_memory.train.images, np.ndarray)
    assert_same(in_memory, expected)
    with (
        little_memory(60 * 6 * 8 * 3 - 1),
        pytest.raises(UserError, match=r"take 0.0 GB in memory, and 0.0 GB are free"),
    ):
        datasets.load(data, in_memory=True)


def test_an_index_takes_images_as_numpy_does(data):
    with little_memory():
        images = datasets.load(data).train.images
    array = images[:]
    assert images.shape == array.shape
    assert images.dtype == array.dtype
    assert images.nbytes == array.nbytes
    for index in (
        3,
        -1,
        slice(5, 20, 3),
        np.array([7, 7, 0]),
        np.array([[1], [2]]),
        np.arange(40) % 3 == 0,
        np.arange(0),
    ):
        assert np.array_equal(images[index], array[index])
    chosen = images.select(np.array([9, 2, 5])).select(np.array([2, 0]))
    assert chosen.shape == (2, 6, 8, 3)
    assert np.array_equal(chosen[:], array[[5, 9]])
    assert np.array_equal(on_disk.checksums(chosen), on_disk.checksums(array[[5, 9]]))
    assert len(list(images)) == 40
    with pytest.raises(IndexError):
        images[40]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_from_disk_are_those_from_memory(data, final_config, processes):
    final_config.batch_size = 8
    final_config.augment.resized_crop_area = 0.2
    final_config.augment.crop_padding = 0
    data.validation_ratio = 0.25
    batches = []
    for free in (10**9, 60 * 6 * 8 * 3):
        with little_memory(free):
            train, validation = datasets.validation_split(datasets.load(data), data)
        assert isinstance(train.images, ImagesOnDisk) == isinstance(validation.images, ImagesOnDisk) == (free < 10**9)
        here = processes - 1, processes
        made = [
            *pipelines.train_batches(train, final_config, 2, 9, *here),
            *pipelines.eval_batches(validation, 8, *here),
        ]
        batches.append(made)
    for ours, theirs in zip(*batches, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.array_equal(ours[name], theirs[name]), name


def test_a_run_from_disk_ends_in_the_state_of_a_run_from_memory(data, tiny_config, tmp_path):
    tiny_config.pipeline = "tf_data"
    tiny_config.batch_size = 8
    with tiny_config.unlocked():
        tiny_config.data = data
    tiny_config.data.mean, tiny_config.data.std = (), ()
    tiny_config.data.validation_ratio = 0.2
    from_memory = training.train(tiny_config, tmp_path / "memory")
    with little_memory():
        from_disk = training.train(tiny_config, tmp_path / "disk")
        with pytest.raises(UserError, match="GB in memory"):
            training.train(config_lib.replaced(tiny_config, {"pipeline": "device"}), tmp_path / "device")
    assert from_disk.state_digest == from_memory.state_digest
    assert from_disk.test_loss == from_memory.test_loss


def test_without_room_in_memory_and_on_disk_the_images_are_refused(data, monkeypatch):
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda path: FullDisk)
    with little_memory(), pytest.raises(UserError) as refused:
        datasets.load(data)
    assert "60 images of 6x8 pixels take 0.0 GB" in str(refused.value)
    assert "of the disk of" in str(refused.value)
    assert "set config.data.cache_dir to a folder on a larger disk, or set config.data.image_size" in str(refused.value)
    assert not list(Path(data.cache_dir).iterdir())


class FullDisk:
    """What `shutil.disk_usage` returns."""

    free = 100


def test_a_disk_that_fills_up_is_an_error_in_one_line_and_leaves_nothing(data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        little_memory(),
        pytest.raises(UserError, match=r"No space left on device.*set config.data.cache_dir to another"),
    ):
        datasets.load(data)
    assert not list(Path(data.cache_dir).iterdir())


DECODES_SLOWLY = """
import sys, time
import launch
from resnet_jax.data import images

read = images.read

def slowly(path):
    print("decoding", flush=True)
    time.sleep(1)
    return read(path)

images.read = slowly
launch.main(sys.argv[1:])
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_decodes(data, tmp_path, signum):
    """All images would take a minute."""
    flags = [
        f"--config.data.name={data.name}",
        f"--config.data.cache_dir={data.cache_dir}",
        "--workdir",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-c", DECODES_SLOWLY, "--config", "configs/final.py:smoke", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        lines = []
        while "decoding\n" not in lines:
            lines.append(run.stdout.readline())
            assert lines[-1], run.stderr.read()
        run.send_signal(signum)
        rest, said = run.communicate()
    assert run.returncode == 128 + signum
    assert f"stopped by {signum.name} before the first step" in said
    assert rest.count("decoding") < 30
    assert not (tmp_path / "run").exists()


def flip_bits(path, position, byte=0x55):
    content = bytearray(path.read_bytes())
    content[position] ^= byte
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_when_its_image_is_read(data, final_config):
    final_config.batch_size = 8
    with little_memory():
        train = datasets.load(data).train
        flip_bits(stored_folder(data) / "train_images", 17 * 6 * 8 * 3 + 5)
        message = rf"image 17 of .*train_images is corrupt: delete {stored_folder(data)}, and rerun"
        assert len(train.images[:17]) == 17
        with pytest.raises(UserError, match=message):
            train.images[15:20]
        with pytest.raises(UserError, match=message):
            list(pipelines.train_batches(train, final_config, 0, 5))


@pytest.mark.parametrize("damage", ["cut off", "missing"])
@pytest.mark.parametrize("damaged", ["train_images", "arrays.npz"])
@pytest.mark.parametrize("free", [10**9, 60 * 6 * 8 * 3])
def test_a_cache_that_is_cut_off_or_incomplete_is_decoded_again(data, capsys, damaged, free, damage):
    in_memory = datasets.load(data)
    shutil.rmtree(data.cache_dir)
    with little_memory():
        datasets.load(data)
    folder = stored_folder(data)
    whole = (folder / damaged).read_bytes()
    (folder / damaged).unlink()
    if damage == "cut off":
        (folder / damaged).write_bytes(whole[:-1])
    with little_memory(free):
        assert_same(datasets.load(data), in_memory)
    assert f"{folder} is corrupt: decoding" in capsys.readouterr().out


def test_test_images_that_are_training_images_are_counted_on_disk_too(data, capsys):
    images = Path(data.name.partition(":")[2])
    for i in (40, 42, 44):
        (images / f"test/ant/{i}.png").write_bytes((images / f"train/ant/{i - 40:02}.png").read_bytes())
    with little_memory():
        datasets.load(data)
    assert "3 of 20 test images are training images too" in capsys.readouterr().err


def test_the_memory_limit_of_a_container_counts(tmp_path, monkeypatch):
    """Those of its own group and of those above it."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**6))
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    assert memory.free() == 10**6  # without control groups
    (tmp_path / "own").write_text("0::/slurm/step\n")
    for group, limit, used in (("slurm", "5000", "4000"), ("slurm/step", "max", "100")):
        (tmp_path / "groups" / group).mkdir(parents=True)
        for name, text in (
            ("max", limit),
            ("current", used),
            ("stat", "anon 3000\ninactive_file 700\nactive_file 20"),
        ):
            (tmp_path / "groups" / group / f"memory.{name}").write_text(text + "\n")
    assert memory.free() == 5000 - 4000 + 720
    (tmp_path / "groups" / "slurm" / "step" / "memory.max").write_text("150\n")
    (tmp_path / "groups" / "slurm" / "step" / "memory.stat").write_text("anon 3000\n")
    assert memory.free() == 50
    (tmp_path / "groups" / "slurm" / "memory.current").write_text("9000")
    assert memory.free() == 0


READS_ALL = """
import resource, sys
from configs import final
from resnet_jax.data import datasets, memory, pipelines

config = final.get_config()
config.data.name, config.data.cache_dir, config.batch_size = sys.argv[1], sys.argv[2], 4
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
limit = used + 150_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(200_000_000)
except MemoryError:
    print("the limit holds")
memory.free = lambda: 60_000_000
dataset = datasets.load(config.data)
train, validation = datasets.validation_split(dataset, config.data)
read = sum(batch["mask"].sum() for split in (train, validation) for batch in pipelines.eval_batches(split, 4))
print(type(train.images).__name__, train.images.nbytes + validation.images.nbytes, read, dataset.fingerprint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory in this way")
def test_a_set_larger_than_the_memory_is_decoded_and_read_within_it(tmp_path):
    """The kernel gives the process 150 MB more than it has when it begins, and the images take 245 MB."""
    for i in range(80):
        file = tmp_path / "images" / ("train" if i < 78 else "test") / ("ant", "bee")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1024, 1024), (i, 3 * i, 0)).save(file)
    command = [sys.executable, "-c", READS_ALL, f"folder:{tmp_path / 'images'}", str(tmp_path / "cache")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[0] == "the limit holds"
    kind, num_bytes, read, fingerprint = run.stdout.splitlines()[-1].split()
    assert (kind, int(num_bytes), int(read)) == ("ImagesOnDisk", 78 * 1024 * 1024 * 3, 78)
    assert len(fingerprint) == 64


def test_the_images_of_a_decode_that_was_killed_are_removed_by_the_next(data):
    killed = Path(data.cache_dir) / ".incomplete-resnet_jax-killed" / "new"
    killed.mkdir(parents=True)
    (killed / "train_images").write_bytes(b"half")
    with little_memory():
        datasets.load(data)
    assert not killed.exists()
