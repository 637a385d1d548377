"""Measure how fast training batches come from images on disk, beside tf.data that decodes JPEG from record files.

    python -m benchmarks.disk_stream --output results/disk-stream-cpu.json

Both read the same set, prepared by TFDS: noisy images of 256x256 pixels as JPEG. Both give batches of 128 random crops, scaled to
224x224 pixels and mirrored. `resnet_jax` reads images that it decoded and scaled once, as it does if they do not fit in
memory. `tf.data` is what TFDS's guide suggests: it shuffles files and a buffer, decodes only the crop, and draws from
TensorFlow's random numbers. A measurement is one pass over the images, before which the operating system forgets the files, so
both read from the disk.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from benchmarks import timing, tool
from configs import resnet50
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.data import pipelines, sources
from resnet_jax.data.datasets import Split
from resnet_jax.data.on_disk import Images, ImagesOnDisk, Store

_SIDE = 256  # of the stored JPEG
_SHUFFLED = 1000  # images in tf.data's buffer


class NoisyJpeg(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Smooth images with some noise, whose JPEG are about as large as those of photographs; the labels alternate."""

    VERSION = tfds.core.Version("1.0.0")
    count = 0

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(_SIDE, _SIDE, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(0)
        for i in range(self.count):
            coarse = rng.uniform(0, 255, (1, 16, 16, 3))
            image = tf.image.resize(coarse, (_SIDE, _SIDE), "bicubic")[0].numpy() + rng.normal(0, 6, (_SIDE, _SIDE, 3))
            yield i, {"image": image.clip(0, 255).astype(np.uint8), "label": i % 2}


class OnDisk(Store):
    """Puts all images on disk, however much memory is free."""

    def empty(self, part: str, shape: tuple[int, ...], rest: int, what: str, remedy: str) -> Images:
        """Return a place on disk."""
        assert self._folder
        return ImagesOnDisk(self._folder / part, shape)


def tf_data(builder: Any, config: ConfigDict) -> Iterator[Any]:
    """Yield batches as TFDS's guide on performance and TensorFlow's ImageNet examples make them."""

    def crop(example: Any) -> tuple[Any, Any]:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            (_SIDE, _SIDE, 3),
            tf.zeros((1, 0, 4)),
            area_range=(config.augment.resized_crop_area, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.decode_and_crop_jpeg(example["image"], tf.concat([begin[:2], size[:2]], 0), channels=3)
        image = tf.image.resize(image, (config.data.image_size, config.data.image_size))
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8), example["label"]

    examples = builder.as_dataset("train", shuffle_files=True, decoders={"image": tfds.decode.SkipDecoding()})
    batches = (
        examples.repeat().shuffle(_SHUFFLED).map(crop, tf.data.AUTOTUNE).batch(config.batch_size, drop_remainder=True)
    )
    return iter(batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def forget(folder: Path) -> None:
    """Ask the operating system to forget what it has read of a folder's files."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.disk_stream", __doc__)
    whole = command_line.whole_number(1)
    parser.add_argument("--images", type=whole, default=10_000, help="in the set (default: 10000)")
    parser.add_argument("--repeats", type=whole, default=5, help="of each, in turns (default: 5)")
    tool.add_output_argument(parser)
    arguments = parser.parse_args(argv)
    tool.check_output(arguments.output)
    config = resnet50.get_config()
    config.batch_size = 128
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "decoded").mkdir()
        NoisyJpeg.count = arguments.images
        builder = NoisyJpeg(data_dir=folder / "tfds")
        builder.download_and_prepare()
        began = time.perf_counter()
        arrays = sources.read_tfds(builder, {"train": "train"}, config.data.image_size, 0, OnDisk(folder / "decoded"))
        decoding = arguments.images / (time.perf_counter() - began)
        train = Split(arrays["train_images"], arrays["train_labels"])
        streams = {
            "resnet_jax": pipelines.train_batches(train, config, 0, 10**9),
            "tf.data": tf_data(builder, config),
        }

        def one_pass(name: str, _seconds: float) -> float:
            forget(folder)
            steps, began = arguments.images // config.batch_size, time.perf_counter()
            for _ in range(steps):
                next(streams[name])
            return steps * config.batch_size / (time.perf_counter() - began)

        rates = timing.interleave({name: partial(one_pass, name) for name in streams}, arguments.repeats, 0.0)
        sizes = {
            "jpeg_bytes": sum(f.stat().st_size for f in (folder / "tfds").rglob("*.tfrecord*")),
            "decoded_bytes": train.images.nbytes,
        }
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    figures = {name: timing.summary(repeats, "images/s") for name, repeats in rates.items()}
    figures |= {
        "resnet_jax / tf.data": timing.summary(ratios, "ratio"),
        "read from disk": timing.summary(
            [rate * train.images.nbytes / arguments.images / 1e6 for rate in rates["resnet_jax"]], "MB/s"
        ),
        "decoding, once": timing.summary([decoding], "images/s"),
    }
    case = {"batch_size": config.batch_size, "dtype": "uint8", "devices": 1, "figures": figures}
    tool.write_result(arguments.output, {"cases": [case], "images": arguments.images, "set": sizes}, config)


if __name__ == "__main__":
    command_line.run(main)
