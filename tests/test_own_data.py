"""Runs on a user's own data: numbers that are computed from them, folders that move, other labelled sets."""

import json
import shutil

import numpy as np
import pytest
from helpers import make_tiny_config, mistake_of_tool, rows, tool
from PIL import Image

from resnet_jax import config as config_lib
from resnet_jax import training
from resnet_jax.cli import command_line
from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import trained_model
from resnet_jax.reporting import evaluation
from resnet_jax.runs import preemption, stored_config, workdir


def short(config):
    """A run of half an epoch, 11 steps, whose mean, standard deviation, class weights, dtype and pipeline are found out."""
    config.num_epochs, config.schedule.warmup_epochs = 0.5, 0.1
    config.data.mean = config.data.std = ()
    config.class_weights = "balanced"
    config.model.dtype = config.pipeline = "auto"
    return config


@pytest.fixture
def own_config(tiny_config):
    return short(tiny_config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """The folder and the result of such a run."""
    directory = tmp_path_factory.mktemp("own") / "run"
    return directory, training.train(short(make_tiny_config(cache_dir)), directory)


def test_mean_and_std_are_those_of_the_training_images_in_every_file_of_the_run(trained, own_config):
    directory, result = trained
    train, _ = datasets.validation_split(datasets.load(own_config.data), own_config.data)
    scaled = train.images / 255
    for name in ("mean", "std"):
        numbers = result.config["data"][name]
        assert np.abs(numbers - getattr(np, name)(scaled, axis=(0, 1, 2))).max() < 1e-6
        assert json.loads((directory / "config.json").read_text())["data"][name] == numbers
        assert json.loads((directory / "result.json").read_text())["config"]["data"][name] == numbers
        assert trained_model.load(directory).config.data[name] == tuple(numbers)
    assert own_config.data.mean == own_config.data.std == ()  # the caller's config is as it was


def test_the_dtype_and_the_pipeline_of_the_machine_are_in_the_result(trained):
    assert (trained[1].config["model"]["dtype"], trained[1].config["pipeline"]) == ("float32", "tf_data")


def test_a_run_of_an_accelerator_goes_on_in_its_dtype(own_config, tmp_path, capsys):
    begun = config_lib.replaced(own_config, {"model.dtype": "bfloat16"})
    with pytest.raises(preemption.TrainingInterrupted):
        training.train(begun, tmp_path / "run", stop_request=preemption.StopRequest(0.0))
    assert training.train(own_config, tmp_path / "run").config["model"]["dtype"] == "bfloat16"
    assert "computing in bfloat16, pipeline tf_data\n" in capsys.readouterr().out


def test_balanced_weights_give_each_class_the_same_sum_in_every_file_of_the_run(trained, own_config):
    directory, result = trained
    train, _ = datasets.validation_split(datasets.load(own_config.data), own_config.data)
    counts = np.bincount(train.labels)
    assert len(set(counts)) > 1  # else any weights would be equal
    text = result.config["class_weights"]
    np.testing.assert_allclose(config_lib.class_weights(text) * counts, len(train.labels) / 10, rtol=1e-12)
    assert json.loads((directory / "config.json").read_text())["class_weights"] == text
    assert trained_model.load(directory).config.class_weights == text


def test_weights_must_be_one_per_class_and_balance_needs_an_image_of_each(own_config):
    train = datasets.Split(np.zeros((4, 5, 7, 3), np.uint8), np.array([0, 0, 2, 2], np.int32))
    with pytest.raises(UserError, match="'balanced', but class 1 has no training image: give numbers"):
        datasets.computed(own_config, train, 3)
    own_config.class_weights = "1,2"
    with pytest.raises(UserError, match="class_weights has 2 numbers for 3 classes: give one per class"):
        datasets.computed(own_config, train, 3)


def test_a_run_with_computed_numbers_is_the_run_with_those_numbers(trained, tmp_path):
    directory, result = trained
    config = command_line.load_config(directory / "config.json")
    assert training.train(config, tmp_path / "typed").state_digest == result.state_digest


def test_the_numbers_are_computed_once_and_a_resumed_run_is_the_uninterrupted_one(
    trained, own_config, tmp_path, monkeypatch
):
    directory, result = trained
    with pytest.raises(preemption.TrainingInterrupted):
        training.train(own_config, tmp_path / "parts", stop_request=preemption.StopRequest(0.0))
    monkeypatch.delattr(datasets, "channel_statistics")
    assert training.train(own_config, tmp_path / "parts").state_digest == result.state_digest
    assert rows(tmp_path / "parts") == rows(directory)
    assert training.train(own_config, tmp_path / "parts").state_digest == result.state_digest  # it is complete
    report = evaluation.run(own_config, tmp_path / "parts", "best")
    assert report["test"]["loss"] == result.test_loss


def test_either_can_be_computed_and_typed_on_the_command_line(trained, cache_dir, tmp_path, capsys):
    numbers = {
        name: command_line.load_config("quickstart", [f"--config.data.{name}=()"]).data[name]
        for name in ("mean", "std")
    }
    assert numbers == {"mean": (), "std": ()}
    config = short(make_tiny_config(cache_dir))
    config.data.mean = (0.5, 0.5, 0.5)
    dataset = datasets.load(config.data)
    filled = datasets.computed(config, datasets.validation_split(dataset, config.data)[0], len(dataset.class_names))
    assert filled.data.mean == (0.5, 0.5, 0.5)
    assert list(filled.data.std) == trained[1].config["data"]["std"]


@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (1, 1, 1, 3)])
def test_channel_statistics_are_exact_to_six_decimals(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    means, deviations = datasets.channel_statistics(images)
    scaled = images.reshape(-1, 3) / 255
    assert np.abs(np.array(means) - scaled.mean(axis=0)).max() < 6e-7
    assert np.abs(np.array(deviations) - scaled.std(axis=0)).max() < 6e-7


def test_a_channel_with_one_value_needs_a_std(own_config):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
    images[..., 2] = 9
    train = datasets.Split(images, np.arange(6, dtype=np.int32) % 2)
    with pytest.raises(UserError, match=r"channel 2 of the training images has one value only: give config\.data\.std"):
        datasets.computed(own_config, train, 2)
    own_config.data.std = (0.2, 0.2, 0.2)
    assert datasets.computed(own_config, train, 2).data.mean[2] == round(9 / 255, 6)


def coloured_folder(root):
    """Two classes of 20 noisy images each, without a test set."""
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (root / label).mkdir(parents=True)
        for i in range(20):
            Image.fromarray((level + rng.integers(-30, 30, (8, 8, 3))).astype(np.uint8)).save(root / label / f"{i}.png")
    return root


def test_a_run_warns_of_a_batch_larger_than_the_training_set_and_of_few_steps(cache_dir, tmp_path, capsys):
    config = folder_config(cache_dir, coloured_folder(tmp_path / "images"))
    config.batch_size, config.schedule.warmup_epochs = 64, 0.0
    training.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    layout = (
        "32 training, 0 validation and 8 test images of 2 classes (<class>/; the test images are a fifth of each class)"
    )
    assert f"{config.data.name}: {layout}\n" in out
    assert "a batch holds 64 images, and there are only 32" in out
    assert "takes only 2 steps of 64 images" in out


def folder_config(cache_dir, root):
    config = short(make_tiny_config(cache_dir))
    config.batch_size, config.num_epochs, config.checkpoint_every_steps = 8, 3.0, 2
    config.data.name, config.data.validation_ratio = f"folder:{root}", 0.0
    return config


@pytest.fixture(scope="module")
def on_folder(tmp_path_factory, cache_dir):
    """The folder of a run on images, the images, and the result."""
    root = coloured_folder(tmp_path_factory.mktemp("images") / "colours")
    directory = tmp_path_factory.mktemp("on_folder") / "run"
    return directory, root, training.train(folder_config(cache_dir, root), directory)


@pytest.fixture
def copied(on_folder, tmp_path):
    directory, root, result = on_folder
    return shutil.copytree(directory, tmp_path / "run"), shutil.copytree(root, tmp_path / "moved"), result


def test_a_run_resumes_to_the_same_end_after_its_folder_moved(on_folder, cache_dir, tmp_path):
    _, root, expected = on_folder
    with pytest.raises(preemption.TrainingInterrupted):
        training.train(folder_config(cache_dir, root), tmp_path / "run", stop_request=preemption.StopRequest(0.0))
    moved = shutil.copytree(root, tmp_path / "moved")
    result = training.train(folder_config(cache_dir, moved), tmp_path / "run")
    assert result.state_digest == expected.state_digest
    assert result.dataset["name"] == f"folder:{moved}"
    assert result.dataset["fingerprint"] == expected.dataset["fingerprint"]


def test_a_run_is_evaluated_and_found_complete_after_its_folder_moved(copied, cache_dir):
    directory, moved, result = copied
    tool("eval", directory, f"--config.data.name=folder:{moved}")
    assert json.loads((directory / "eval.json").read_text())["test"]["accuracy"] == result.test_accuracy
    assert training.train(folder_config(cache_dir, moved), directory).state_digest == result.state_digest


def test_other_data_are_refused_with_both_fingerprints(copied, cache_dir, capsys):
    directory, moved, result = copied
    (moved / "dark/0.png").unlink()
    now = datasets.load(folder_config(cache_dir, moved).data).fingerprint
    words = f"fingerprint {result.dataset['fingerprint'][:12]} then, {now[:12]} now"
    assert words in mistake_of_tool(capsys, "eval", directory, f"--config.data.name=folder:{moved}")
    with pytest.raises(UserError, match=words):  # the run is complete
        training.train(folder_config(cache_dir, moved), directory)
    (directory / "result.json").unlink()
    before = (directory / "config.json").read_text()
    with pytest.raises(UserError, match=words):
        training.train(folder_config(cache_dir, moved), directory)
    assert (directory / "config.json").read_text() == before


def test_a_run_without_a_checkpoint_computes_its_numbers_again(own_config, tmp_path):
    numbers = {"data.mean": (0.1, 0.1, 0.1), "data.std": (1, 1, 1)}
    stored = stored_config.to_json(config_lib.replaced(own_config, numbers))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdir.check(tmp_path, own_config).data.mean == ()
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    assert workdir.check(tmp_path, own_config).data.mean == (0.1, 0.1, 0.1)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_another_set_is_evaluated_into_a_file_of_its_own(on_folder, tmp_path, capsys):
    directory, root, _ = on_folder
    before = contents(directory)
    shifted = tmp_path / "shifted set"
    for label, other in (("dark", "light"), ("light", "dark")):  # every label is wrong
        (shifted / label).mkdir(parents=True)
        for i in range(3):
            Image.open(root / other / f"{i}.png").resize((24, 16)).save(shifted / label / f"{i}.png")
    tool("eval", directory, "--data", f"folder:{shifted}")
    out = capsys.readouterr().out
    assert f"evaluating 6 images of folder:{shifted} (all)" in out
    (file,) = set(contents(directory)) - set(before)
    report = json.loads(file.read_text())
    assert file.name == f"eval-shifted-set-{report['dataset']['fingerprint'][:8]}.json"
    assert report["test"]["accuracy"] == 1 - trained_accuracy(directory, root)
    assert report["dataset"]["splits"] == {"test": 6}
    file.unlink()
    assert contents(directory) == before


def trained_accuracy(directory, root):
    model = trained_model.load(directory)
    files = [(label, root / label / f"{i}.png") for label in ("dark", "light") for i in range(3)]
    images = [Image.open(path).resize((24, 16)) for _, path in files]
    return np.mean([name == label for name, (label, _) in zip(model.predict(images).names, files, strict=True)])


def test_the_runs_own_data_give_the_runs_own_accuracy_also_with_the_classes_in_another_order(
    trained, own_config, tmp_path
):
    directory, result = trained
    report = evaluation.run_on(own_config, directory, "best", "digits")
    assert report["test"]["accuracy"] == result.test_accuracy
    assert report["test"]["loss"] == pytest.approx(result.test_loss, rel=1e-5)
    digits = datasets.load(own_config.data)
    order = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    arrays = {"train_images": digits.test.images, "train_labels": np.argsort(order)[digits.test.labels]}
    np.savez(tmp_path / "other.npz", **arrays, class_names=np.array(digits.class_names)[order])
    other = evaluation.run_on(own_config, directory, "best", f"npz:{tmp_path}/other.npz")
    assert other["test"] == report["test"]
    assert (directory / f"eval-other-{other['dataset']['fingerprint'][:8]}.json").exists()


def test_a_set_of_other_classes_or_another_size_is_refused_and_nothing_is_written(on_folder, trained, tmp_path, capsys):
    directory, root, _ = on_folder
    before = contents(directory)
    images = np.zeros((4, 8, 9, 3), np.uint8)
    np.savez(tmp_path / "wide.npz", train_images=images, train_labels=[0, 1, 0, 1], class_names=["dark", "light"])
    shutil.copytree(root, tmp_path / "three")
    shutil.copytree(root / "dark", tmp_path / "three/dim")
    for data, words in {
        f"npz:{tmp_path}/wide.npz": "has images of (8, 9, 3), and the run (8, 8, 3): scale them",
        f"folder:{tmp_path}/three": "has other classes than the run: it adds dim",
        "digits": "has other classes than the run: it lacks dark, light",
    }.items():
        assert words in mistake_of_tool(capsys, "eval", directory, "--data", data)
    words = mistake_of_tool(capsys, "eval", directory, "--data", "digits", "--fit-temperature")
    assert "leave out --data" in words
    assert contents(directory) == before
