"""A TFDS data set that is not CIFAR: 6 + 4 grey images of 5x7 pixels; importing this registers it as "toy_grey".

And "toy_one_split", of 10 such images in one split, "toy_contest", whose test images have no labels, and "toy_validated",
which has a split "validation" too."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class ToyGrey(tfds.core.GeneratorBasedBuilder):
    """Every pixel of a split's image i is 10 i; the labels alternate."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        image, label = tfds.features.Image(shape=(5, 7, 1)), tfds.features.ClassLabel(names=["even", "odd"])
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label}), disable_shuffling=True
        )

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(6), "test": self._generate_examples(4)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            yield i, {"image": np.full((5, 7, 1), 10 * i, np.uint8), "label": i % 2}


class ToyOneSplit(ToyGrey):
    """The same images in a split "full"."""

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {"full": self._generate_examples(10)}


class ToyContest(ToyGrey):
    """The same images, of which 4 are the split "validation", and a split "test" without labels."""

    def _split_generators(self, _: Any) -> dict[str, Any]:
        train, validation, test = (self._generate_examples(count) for count in (6, 4, 3))
        return {"train": train, "validation": validation, "test": ((i, {**e, "label": -1}) for i, e in test)}


class ToyValidated(ToyGrey):
    """The same images, and 2 in a split "validation"."""

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return super()._split_generators(_) | {"validation": self._generate_examples(2)}
