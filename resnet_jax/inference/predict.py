"""Predict the classes of image files with a trained network.

    python -m resnet_jax predict runs/final cat.png photos/ 'more/*.jpg' images.npz

A FILE is a PNG, JPEG, WebP, BMP, GIF or TIFF image, a folder of images (searched recursively), a pattern, or an .npz with an
array `images` or a single array. Files of a folder or a pattern that are no images are left out and counted. Training reads the
images of a folder in the same way: grey, palette and 16-bit images become RGB, transparent images get a white background, and the
camera's rotation is applied.
"""

import argparse
import csv
import glob
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, say_loading
from resnet_jax.data import images
from resnet_jax.disk import files
from resnet_jax.errors import UserError, one_line, reason
from resnet_jax.inference import unlabelled


def read_npz(path: Path) -> np.ndarray:
    """Read the images of an `.npz`.

    Raises:
        OSError, ValueError: if it cannot be read, or has several arrays and none is named `images`.
    """
    arrays = np.load(files.readable(path), allow_pickle=False)
    if isinstance(arrays, np.ndarray):  # an .npy with another suffix
        return arrays
    with arrays:
        names = arrays.files
        if "images" not in names and len(names) != 1:
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}: name the array of images 'images'")
        return np.asarray(arrays["images" if "images" in names else names[0]])


def listed(arguments: Sequence[str]) -> list[Path]:
    """List the files that the arguments name; say how many files of folders and patterns were left out.

    Raises:
        UserError: if an argument names no file.
    """
    files: list[Path] = []
    for argument in arguments:
        path = Path(os.path.expanduser(argument))
        others = 0
        if path.is_dir():
            try:
                matches, others = images.find(path)
            except OSError as error:
                what = f"{error.filename} cannot be read ({error.strerror})"
                raise UserError(f"{what}: fix this, or leave it out") from error
        elif path.exists():
            matches = [path]
        else:
            named = _matching(str(path))
            matches = [p for p in named if p.suffix.lower() == ".npz" or images.is_image(p)]
            others = len(named) - len(matches)
        if others:
            print(f"{one_line(path)}: {images.left_out(others)}", file=sys.stderr)
        if not matches:
            raise UserError(
                f"{argument} names no image: give files ({images.NAMES}), a folder of them, a pattern, or an .npz"
            )
        files += matches
    return files


def _matching(pattern: str) -> list[Path]:
    """The files that match a pattern, sorted: those of a folder once, even if links lead to it again, or to one around it."""
    longest_first = sorted(glob.glob(pattern, recursive=True), key=lambda path: path.count(os.sep), reverse=True)
    shortest = {(os.path.realpath(os.path.dirname(path)), os.path.basename(path)): Path(path) for path in longest_first}
    return sorted(path for path in shortest.values() if not path.is_dir())


class Batches:
    """The images of files, a batch at a time: however many files there are, one batch of them is in memory.

    Args:
        files: to read; each that cannot be is reported on stderr and counted.
        as_batch: makes an array [N, H, W, 3], uint8 or float32, of what a file holds.
        size: the images of a batch; the images of one `.npz` stay together.

    Attributes:
        unreadable: the number of files that could not be read so far.
    """

    def __init__(self, files: Sequence[Path], as_batch: Callable[[Any], np.ndarray], size: int) -> None:
        self._files, self._as_batch, self._size = files, as_batch, size
        self.unreadable = 0

    def __iter__(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield the names of a batch's images ("cat.png", "images.npz[0]") and its array."""
        names: list[str] = []
        parts: list[np.ndarray] = []
        shows = sys.stderr.isatty() and not sys.stdout.isatty() and len(self._files) > self._size
        for done, path in enumerate(self._files):
            try:
                is_npz = path.suffix.lower() == ".npz"
                part = self._as_batch(read_npz(path) if is_npz else np.asarray(images.read(path)))
            except Exception as error:  # a decoder can raise anything on hostile bytes
                self.unreadable += 1
                _say(f"warning: {one_line(path)} cannot be read ({reason(error)}): skipped", end="\n")
                continue
            if parts and (len(names) >= self._size or part.dtype != parts[0].dtype):
                yield names, np.concatenate(parts)
                names, parts = [], []
                if shows:
                    _say(f"{done:,} of {len(self._files):,} files")
            names += [f"{path}[{i}]" for i in range(len(part))] if is_npz else [str(path)]
            parts.append(part)
        if parts:
            yield names, np.concatenate(parts)
        if shows:
            _say("")


def _say(text: str, end: str = "") -> None:
    """Print on stderr; on a terminal over the last line, which says how many files are done."""
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


Rows = Iterable[tuple[str, list[tuple[str, float]]]]  # an image's name; its most likely classes and their probabilities


def write_table(out: IO[str], rows: Rows, width: int) -> None:
    """Write one line per image, as it comes; the classes begin after `width` characters."""
    for name, top in rows:
        name = name if name.isprintable() else ascii(name)[1:-1]  # a line break in a name would look like another file
        shown = (f"{one_line(label)} {probability:.1%}" for label, probability in top)
        out.write(f"{name:<{width}}  " + "  ".join(shown) + "\n")


def write_csv(out: IO[str], rows: Rows, width: int) -> None:
    """Write one line per image and class, as they come; names as they are, except to a terminal."""
    shown = one_line if out.isatty() else str
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["file", "rank", "class", "probability"])
    for name, top in rows:
        table.writerows((shown(name), i, shown(label), p) for i, (label, p) in enumerate(top, start=1))


def write_json(out: IO[str], rows: Rows, width: int) -> None:
    """Write a list of {"file", "predictions": [{"class", "probability"}]}, one as it comes."""
    between = "["
    for name, top in rows:
        row = {"file": name, "predictions": [{"class": label, "probability": p} for label, p in top]}
        out.write(between + "\n" + textwrap.indent(json.dumps(row, indent=2), "  "))
        between = ","
    out.write("[]\n" if between == "[" else "\n]\n")


def main(argv: Sequence[str]) -> None:
    """Run the tool `predict`."""
    parser = ArgumentParser("python -m resnet_jax predict", __doc__)
    parser.add_argument("run", metavar="RUN", help="workdir of a run, or its .safetensors or .stablehlo export")
    parser.add_argument("files", nargs="*", metavar="FILE", help="image, folder, pattern or .npz")
    command_line.add_checkpoint_argument(parser)
    parser.add_argument("--top", type=int, metavar="K", help="classes to show for each image (default: 3)")
    command_line.add_views_argument(parser)
    parser.set_defaults(write=write_table)
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_const", const=write_json, dest="write", help="print JSON")
    style.add_argument("--csv", action="store_const", const=write_csv, dest="write", help="print CSV")
    parser.add_argument(
        "--unlabelled",
        type=command_line.local_path,
        metavar="FILE",
        help="images to label instead of FILEs: a pickled dict of data and ids, or an .npz",
    )
    parser.add_argument(
        "--output", type=command_line.local_path, metavar="CSV", help="file of ID,Labels to write for --unlabelled"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.unlabelled) != bool(arguments.output):
        raise UserError("--unlabelled FILE and --output CSV need each other: give both")
    if bool(arguments.files) == bool(arguments.unlabelled):
        raise UserError("give either images, or --unlabelled FILE --output CSV")
    if arguments.top is not None and arguments.top < 1:
        raise UserError(f"--top must be at least 1, got {arguments.top}")
    if arguments.unlabelled and (arguments.top or arguments.write is not write_table):
        raise UserError("--top, --json and --csv do not apply to --unlabelled: leave them out")
    if arguments.unlabelled:
        submit(arguments)
    else:
        show(arguments)


def submit(arguments: argparse.Namespace) -> None:
    """Predict the labels of unlabelled images and write them as CSV."""
    if arguments.output.exists() and arguments.output.samefile(arguments.unlabelled):
        raise UserError(f"--output {arguments.output} would overwrite the file of --unlabelled: give another file")
    data, ids = unlabelled.read(arguments.unlabelled)
    say_loading(arguments.run)
    from resnet_jax.inference import trained_model  # after the checks, because JAX takes seconds to import

    model = trained_model.load(arguments.run, arguments.checkpoint)
    try:
        labels = model.predict(data, arguments.views).labels
    except ValueError as error:
        raise UserError(f"--unlabelled {arguments.unlabelled} cannot be used ({error}): give images") from error
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([("ID", "Labels"), *zip(ids, labels.tolist(), strict=True)])
    files.write_text(arguments.output, text.getvalue())
    print(f"{arguments.output}: {len(ids)} images")


def show(arguments: argparse.Namespace) -> None:
    """Print the most likely classes of image files, batch by batch.

    Raises:
        UserError: after printing, if some files could not be read.
    """
    files = listed(arguments.files)
    say_loading(arguments.run)
    from resnet_jax.inference import trained_model

    model = trained_model.load(arguments.run, arguments.checkpoint)
    as_batch = partial(trained_model.as_batch, image_shape=model.image_shape)
    batches = Batches(files, as_batch, trained_model.LARGEST_BATCH)

    def rows() -> Rows:
        for names, batch in batches:
            for name, row in zip(names, model.predict(batch, arguments.views).probabilities, strict=True):
                most_likely = np.argsort(-row, kind="stable")[: arguments.top or 3]
                yield name, [(model.class_names[i], float(row[i])) for i in most_likely]

    arguments.write(sys.stdout, rows(), max(len(str(file)) for file in files))
    if batches.unreadable:
        raise UserError(f"{batches.unreadable} of {len(files)} files could not be read: fix them, or leave them out")
