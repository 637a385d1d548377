"""Serve a page to try a trained network: drop an image, see the predicted class and the pixels that mattered.

    python -m resnet_jax serve runs/final        # then open http://127.0.0.1:8000; needs pip install 'resnet_jax[demo]'

Programs can use it as well: `curl --data-binary @cat.jpg http://127.0.0.1:8000/predict` returns JSON.
"""

import base64
import ctypes
import io
import ipaddress
import logging
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from resnet_jax import host
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, say_loading
from resnet_jax.data import images
from resnet_jax.errors import UserError

if TYPE_CHECKING:
    import flask

    from resnet_jax.inference.trained_model import Model

MAX_BYTES = 10_000_000  # of an upload
MAX_PIXELS = 25_000_000  # of an upload: reading it takes up to 25 bytes of memory a pixel
_IDLE_SECONDS = 10  # after which a connection that sends nothing is closed
MAX_CONNECTIONS = 500  # fewer than the 1,024 files that a process may usually open
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TOP = 5
_SAMPLES = 12  # fill 2, 3, 4 or 6 columns evenly


class Sample(NamedTuple):
    """A test image to click.

    Attributes:
        label: the name of its true class.
        png: the bytes of its PNG file.
    """

    label: str
    png: bytes


def samples(model: "Model") -> list[Sample]:
    """Return test images of the run's data: the first image of each class, then the second of each, up to 12 in all.

    Raises:
        UserError: if the data cannot be loaded or have other classes.
    """
    from resnet_jax.data import datasets

    try:
        dataset = datasets.load(model.config.data)
        if dataset.class_names != model.class_names:
            raise UserError(f"{dataset.name} has changed since the run started: its classes differ")
    except UserError as error:
        raise UserError(f"{error}; use --no-samples to show no test images") from error
    by_class = np.argsort(dataset.test.labels, kind="stable")
    labels = dataset.test.labels[by_class]
    rank_in_class = np.arange(len(labels)) - np.searchsorted(labels, labels)
    shown = by_class[np.lexsort((labels, rank_in_class))][:_SAMPLES]
    labels, pixels = dataset.test.labels[shown], dataset.test.images[shown]
    return [Sample(dataset.class_names[label], images.png(image)) for label, image in zip(labels, pixels, strict=True)]


def picture(upload: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an uploaded image file and resize it: uint8 [1, *image_shape].

    Raises:
        ValueError: if it is not an image that can be read; the message is for the user of the page.
    """
    from resnet_jax.inference import trained_model

    try:
        return trained_model.as_batch(np.asarray(images.read(io.BytesIO(upload), MAX_PIXELS)), image_shape)
    except Exception as error:  # a decoder can raise anything on hostile bytes
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(f"This image cannot be used: it has more than {MAX_PIXELS:,} pixels.") from error
        if isinstance(error, ValueError):
            raise ValueError(f"This image cannot be used: {error}.") from error
        raise ValueError(f"This file cannot be read. Use an image: {images.NAMES}.") from error


def answer(model: "Model", batch: np.ndarray) -> dict[str, object]:
    """Return what the page shows for an image.

    Args:
        model: a model with variables.
        batch: uint8 [1, H, W, 3] from `picture`.

    Returns:
        {"predictions": [{"class", "probability"}] of the 5 most likely classes, "seen": the resized image, "saliency":
        a map of the pixels that mattered; both images are PNG files as data: URIs}.
    """
    from matplotlib import colormaps

    probabilities = model.predict(batch).probabilities[0]
    most_likely = np.argsort(-probabilities, kind="stable")[:_TOP]
    heat = colormaps["inferno"](model.saliency(batch)[0], bytes=True)[..., :3]
    seen, saliency = (
        f"data:image/png;base64,{base64.b64encode(images.png(image)).decode()}" for image in (batch[0], heat)
    )
    predictions = [{"class": model.class_names[i], "probability": float(probabilities[i])} for i in most_likely]
    return {"predictions": predictions, "seen": seen, "saliency": saliency}


def _is_of_another_site(request: "flask.Request") -> bool:
    """Whether a page of another site sent a request through its user's browser, as the browser's headers tell."""
    headers = request.headers
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return True
    origin = headers.get("Origin")
    return origin is not None and origin.partition("://")[2] != headers.get("Host")  # a proxy may change the scheme


def _free_memory() -> None:
    """Give memory that is no longer used back to the system; glibc, unlike other C libraries, keeps much of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def make_app(model: "Model", name: str, shown: list[Sample], hosts: set[str] | None = None) -> "flask.Flask":
    """Build the web application: the page, its test images and its predictions.

    Args:
        model: a model with variables.
        name: the run's name.
        shown: test images to click.
        hosts: host names that requests may use, so that no other name leads a browser here; None for any name.
    """
    import flask

    app = flask.Flask(__name__, static_folder=None, template_folder=str(host.TEMPLATES))
    one_at_a_time = threading.Lock()  # an image can take hundreds of MB until it is resized

    @app.before_request
    def refuse_other_sites() -> None:
        request = flask.request
        if hosts is not None and urlsplit(f"//{request.host}").hostname not in hosts:
            flask.abort(400, "This page has another address.")
        if request.method == "POST" and _is_of_another_site(request):
            flask.abort(403, "Pages of other sites may not post here.")

    @app.after_request
    def protect(response: flask.Response) -> flask.Response:
        for header, value in _HEADERS.items():
            response.headers.setdefault(header, value)
        return response

    @app.get("/")
    def page() -> flask.Response:
        nonce = secrets.token_urlsafe(16)
        text = flask.render_template(
            "serve.html", model=model, name=name, samples=shown, max_bytes=MAX_BYTES, nonce=nonce
        )
        return flask.Response(text, headers={"Content-Security-Policy": _PAGE_POLICY.format(nonce=nonce)})

    @app.get("/samples/<int:index>.png")
    def sample(index: int) -> flask.Response:
        if index >= len(shown):
            flask.abort(404)
        return flask.Response(shown[index].png, mimetype="image/png")

    @app.post("/predict")
    def of_upload() -> tuple[dict[str, object], int]:
        with one_at_a_time:
            try:
                batch = picture(flask.request.get_data(cache=False), model.image_shape)
            except ValueError as error:
                return {"error": str(error)}, 400
            finally:
                _free_memory()
            return answer(model, batch), 200

    return app


def _listening(host: str, port: int) -> socket.socket:
    """Open a socket that listens at an address.

    Raises:
        UserError: if the address is wrong or in use.
    """
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("a port is 0 to 65535")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: {reason}: give an address of this machine, such as 127.0.0.1, and a free "
            "port, or --port=0 for any free port"
        ) from error


def _hosts(host: str, address: str) -> set[str] | None:
    """Return the host names that requests to `--host` may use; None for any where other machines can reach its address.

    The names by which other machines call this one are not known here.
    """
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return {"localhost", address, host.lower()} if loopback else None


def main(argv: Sequence[str]) -> None:
    """Run the tool `serve`."""
    parser = ArgumentParser("python -m resnet_jax serve", __doc__)
    parser.add_argument(
        "run", metavar="RUN", type=command_line.local_path, help="workdir of a run, or its .safetensors export"
    )
    command_line.add_checkpoint_argument(parser)
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
        raise UserError("the page needs flask and waitress: pip install 'resnet_jax[demo]'") from error
    with _listening(arguments.host, arguments.port) as listening:  # first, because loading takes seconds
        say_loading(arguments.run)
        from resnet_jax.inference import trained_model

        model = trained_model.load(arguments.run, arguments.checkpoint)
        # It compiles, and fails early if there are no weights.
        _ = answer(model, np.zeros((1, *model.image_shape), np.uint8))
        shown = [] if arguments.no_samples else samples(model)
        address, port = listening.getsockname()[:2]
        shown_address = f"[{address}]" if ":" in address else address
        hosts = _hosts(arguments.host, address)
        if hosts is None:
            print(f"warning: {address} can be reached by other machines, and the page has no password", file=sys.stderr)
        app = make_app(model, arguments.run.resolve().name, shown, hosts)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it logs a warning for each request that waits
        server = waitress.create_server(
            app,
            sockets=[listening],
            max_request_body_size=MAX_BYTES + 1,
            connection_limit=MAX_CONNECTIONS,
            channel_timeout=_IDLE_SECONDS,
            cleanup_interval=1,
        )
        print(f"http://{shown_address}:{port} (press Ctrl-C to stop)", flush=True)
        server.run()
