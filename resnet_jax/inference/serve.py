"""A page to try a trained network in a browser: drop a picture, see what it is taken for and which pixels mattered.

    python -m resnet_jax serve runs/final        # then open http://127.0.0.1:8000; needs pip install -e '.[demo]'

Programs can ask too: `curl --data-binary @cat.jpg http://127.0.0.1:8000/predict` is answered with JSON.
"""

import base64
import io
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from resnet_jax import host
from resnet_jax.command_line import ArgumentParser
from resnet_jax.errors import UserError

if TYPE_CHECKING:
    import flask

    from resnet_jax.inference.trained_model import Model

MAX_BYTES = 10_000_000  # of an upload
_MAX_PIXELS = 50_000_000  # of a picture: a small file can hold billions
_TOP = 5
_SAMPLES = 12


class Sample(NamedTuple):
    """A test image to click.

    Attributes:
        label: the name of its class.
        png: its file.
    """

    label: str
    png: bytes


def _png(image: np.ndarray) -> bytes:
    """The file of an image uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def samples(model: "Model") -> list[Sample]:
    """The first test image of each of the first classes, from the data of the model's run.

    Raises:
        UserError: where the data are not there.
    """
    from resnet_jax.data import datasets

    try:
        dataset = datasets.load(model.config.data)
        if dataset.class_names != model.class_names:
            raise UserError(f"{dataset.name} has changed since the run began: its classes are others")
    except UserError as error:
        raise UserError(f"{error}; --no-samples shows the page without test images") from error
    _, firsts = np.unique(dataset.test.labels, return_index=True)
    shown = firsts[:_SAMPLES]
    labels, images = dataset.test.labels[shown], dataset.test.images[shown]
    return [Sample(dataset.class_names[label], _png(image)) for label, image in zip(labels, images, strict=True)]


def picture(upload: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The picture of a file as a network takes it: uint8 [1, *image_shape].

    Raises:
        ValueError: where it is none; the message is for whoever sent it.
    """
    from resnet_jax.inference import predict, trained_model

    try:
        return trained_model.as_batch(predict.read_image(io.BytesIO(upload), _MAX_PIXELS), image_shape)
    except Exception as error:  # what a decoder raises on hostile bytes is of every kind
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(f"This picture is not read: it has more than {_MAX_PIXELS:,} pixels.") from error
        if isinstance(error, ValueError):
            raise ValueError(f"This picture is not read: {error}.") from error
        raise ValueError("This is no PNG, JPEG or WebP picture that can be read.") from error


def answer(model: "Model", batch: np.ndarray) -> dict[str, object]:
    """What the page shows of a picture.

    Args:
        model: with variables.
        batch: from `picture`.

    Returns:
        {"predictions": [{"class", "probability"}] of the likeliest, "seen": the picture, "saliency": a map of which of its
        pixels mattered, both PNG as data: URIs}.
    """
    from matplotlib import colormaps

    probabilities = model.predict(batch).probabilities[0]
    likeliest = np.argsort(-probabilities, kind="stable")[:_TOP]
    heat = colormaps["inferno"](model.saliency(batch)[0], bytes=True)[..., :3]
    seen, saliency = (f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}" for image in (batch[0], heat))
    predictions = [{"class": model.class_names[i], "probability": float(probabilities[i])} for i in likeliest]
    return {"predictions": predictions, "seen": seen, "saliency": saliency}


def make_app(model: "Model", name: str, shown: list[Sample], hosts: list[str] | None = None) -> "flask.Flask":
    """The page, its test images and its answers.

    Args:
        model: with variables.
        name: of the run.
        shown: test images to click.
        hosts: names by which it may be asked for, so that no other site's page can ask; None for any.
    """
    import flask

    app = flask.Flask(__name__, static_folder=None, template_folder=str(host.TEMPLATES))
    app.config["TRUSTED_HOSTS"] = hosts
    one_at_a_time = threading.Lock()  # a picture may take hundreds of MB until it is scaled

    @app.get("/")
    def page() -> str:
        return flask.render_template("serve.html", model=model, name=name, samples=shown, max_bytes=MAX_BYTES)

    @app.get("/samples/<int:index>.png")
    def sample(index: int) -> flask.Response:
        if index >= len(shown):
            flask.abort(404)
        return flask.Response(shown[index].png, mimetype="image/png")

    @app.post("/predict")
    def of_upload() -> tuple[dict[str, object], int]:
        upload = flask.request.get_data()
        with one_at_a_time:
            try:
                batch = picture(upload, model.image_shape)
            except ValueError as error:
                return {"error": str(error)}, 400
            return answer(model, batch), 200

    return app


def _listening(host: str, port: int) -> socket.socket:
    """A socket of that address.

    Raises:
        UserError: where it cannot be had.
    """
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("there is no such port")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: {reason}: give an address of this machine, as 127.0.0.1, and a free port, or "
            "--port=0 for any"
        ) from error


def main(argv: Sequence[str]) -> None:
    """The tool."""
    parser = ArgumentParser("python -m resnet_jax serve", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="workdir of a run, or its .safetensors export")
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, latest or a step (default: best)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 for any free port (default: 8000)")
    parser.add_argument(
        "--no-samples", action="store_true", help="show no test images, so that the data set is not needed"
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing needs saving, and Python's handler waits while JAX loads
    try:
        import flask  # noqa: F401
        import waitress
    except ImportError as error:
        raise UserError("the page needs flask and waitress: pip install -e '.[demo]'") from error
    with _listening(arguments.host, arguments.port) as listening:  # first, for loading takes seconds
        from resnet_jax.inference import trained_model

        model = trained_model.load(arguments.run, arguments.checkpoint)
        _ = answer(model, np.zeros((1, *model.image_shape), np.uint8))  # compiles, and finds weights missing
        shown = [] if arguments.no_samples else samples(model)
        address, port = listening.getsockname()[:2]
        shown_address = f"[{address}]" if ":" in address else address
        hosts: list[str] | None = ["localhost", shown_address]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            print(f"warning: {address} is open to whoever reaches this machine", file=sys.stderr)
            hosts = None  # it has names that are not known here
        app = make_app(model, arguments.run.resolve().name, shown, hosts)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits
        server = waitress.create_server(app, sockets=[listening], max_request_body_size=MAX_BYTES + 1)
        print(f"http://{shown_address}:{port} (Ctrl-C ends it)", flush=True)
        server.run()
