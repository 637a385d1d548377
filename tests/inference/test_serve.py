import base64
import contextlib
import http.client
import io
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import browser
import numpy as np
import psutil
import pytest
import werkzeug.serving
from helpers import assert_user_error, launch, make_tiny_config, mistake_of_tool, start, tool
from PIL import Image

from resnet_jax.data import datasets
from resnet_jax.errors import UserError
from resnet_jax.inference import export, serve, trained_model

pytest.importorskip("flask", reason="Flask is not installed here: there is no page to try a network")
DEMO = ("-m", "resnet_jax", "serve")
NO_PICTURE = "This file cannot be read. Use an image: PNG, JPEG, WebP, BMP, GIF or TIFF."


@pytest.fixture(autouse=True)
def _ctrl_c():
    """The tool gives Ctrl-C to the operating system; a test that runs it in this process gives it back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def model(run):
    return trained_model.load(run)


@pytest.fixture(scope="module")
def digits(cache_dir):
    """The test split of digits."""
    return datasets.load(make_tiny_config(cache_dir).data).test


@pytest.fixture(scope="module")
def client(model):
    """Asks the page without a server."""
    return serve.make_app(model, "run", serve.samples(model)).test_client()


@contextlib.contextmanager
def served(run, *flags):
    """A server of the page, as a user starts it: its process and address."""
    process = start(run, "--port=0", *flags, program=DEMO)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), process.stderr.read()
        yield process, line.split()[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(run):
    with served(run) as (_, url):
        yield url


def file_of(image, kind="PNG", **more):
    """The bytes of an image's file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **more)
    return stream.getvalue()


def answered(url, method, path, data=None, **headers):
    """The status and the body that the server answers with."""
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()


# What it answers


def test_it_answers_what_the_model_predicts(client, model, digits):
    found = client.post("/predict", data=file_of(digits.images[0])).json
    expected = model.predict(digits.images[0]).probabilities[0]
    order = np.argsort(-expected)[:5]
    assert [entry["class"] for entry in found["predictions"]] == [str(i) for i in order]
    assert [entry["probability"] for entry in found["predictions"]] == pytest.approx(expected[order], abs=1e-6)
    seen, saliency = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found[name].partition(",")[2]))))
        for name in ("seen", "saliency")
    )
    assert (seen == digits.images[0]).all()
    assert saliency.shape == (8, 8, 3)
    brightest = saliency.astype(int).sum(axis=2).argmax()
    assert brightest == model.saliency(digits.images[0])[0].argmax()


def test_the_samples_are_the_first_test_images_of_each_class_in_turn(client, model, digits):
    shown = serve.samples(model)
    assert [sample.label for sample in shown] == [*map(str, range(10)), "0", "1"]
    for i, sample in enumerate(shown):
        assert client.get(f"/samples/{i}.png").data == sample.png
        image = np.asarray(Image.open(io.BytesIO(sample.png)))
        assert (image == digits.images[np.flatnonzero(digits.labels == i % 10)[i // 10]]).all()
    assert client.get("/samples/12.png").status_code == 404


def png_of_size(width, height):
    """A PNG that says it has this size, and has no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    whole = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
HOSTILE = {
    "empty": (b"", NO_PICTURE),
    "text": (b"<html>not a picture</html>", NO_PICTURE),
    "cut": (file_of(NOISE)[:2000], NO_PICTURE),
    "noise after the head": (file_of(NOISE, "JPEG")[:20] + bytes(range(256)) * 9, NO_PICTURE),
    "larger than memory": (
        png_of_size(60_000, 60_000),
        "This image cannot be used: it has more than 25,000,000 pixels.",
    ),
    "too many pixels": (
        png_of_size(5_001, 5_000),
        "This image cannot be used: it has 5001 x 5000 pixels, more than the limit of 25,000,000.",
    ),
    "long and thin": (
        file_of(np.zeros((1, 5000, 3), np.uint8)),
        "This image cannot be used: it has 5000 x 1 pixels: one side may be at most 1000 times as long as the other.",
    ),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n%%EOF\n", NO_PICTURE),
    "another kind": (file_of(NOISE, "PPM"), NO_PICTURE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_gets_a_message_and_the_next_one_an_answer(client, digits, kind):
    upload, message = HOSTILE[kind]
    refused = client.post("/predict", data=upload)
    assert refused.status_code == 400
    assert refused.json == {"error": message}
    assert client.post("/predict", data=file_of(digits.images[0])).status_code == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_each_kind_and_size_are_read(client, kind):
    assert client.post("/predict", data=file_of(NOISE, kind)).status_code == 200


def test_names_are_shown_as_text(model):
    names = ("<script>alert(1)</script>", *map(str, range(1, 10)))
    named = trained_model.Model(model.config, names, model.image_shape, model.variables, model.step)
    page = serve.make_app(named, "<b>run</b>", [serve.Sample("<i>", b"")]).test_client().get("/").text
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;run&lt;/b&gt;" in page
    assert "<i>" not in page


# The server


def test_an_upload_that_is_too_large_is_refused(address):
    size = {"Content-Length": str(serve.MAX_BYTES + 1)}
    status, body = answered(address, "POST", "/predict", b"the beginning", **size)  # it does not wait for the rest
    assert status == 413
    assert b"Too Large" in body
    whole = file_of(NOISE)
    largest = whole + bytes(serve.MAX_BYTES - len(whole))  # a PNG may be followed by anything
    assert answered(address, "POST", "/predict", largest)[0] == 200


def test_another_name_does_not_lead_to_the_page(address):
    port = address.rpartition(":")[2]
    for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("evil.example", 400)):
        assert answered(address, "GET", "/", Host=host)[0] == status


def test_a_page_of_another_site_cannot_post(address):
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    others = [
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"},  # another server of this machine
        {"Origin": "https://evil.example"},  # of an older browser
        {"Origin": "null"},  # of a file, or of a frame in a sandbox
    ]
    for headers, status in ((own, 200), ({}, 200), *((headers, 403) for headers in others)):
        assert answered(address, "POST", "/predict", file_of(NOISE), **headers)[0] == status, headers


def test_a_browser_is_told_to_keep_the_page_to_itself(address):
    with contextlib.closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as connection:
        for method, path in (("GET", "/"), ("GET", "/samples/0.png"), ("POST", "/predict"), ("GET", "/nothing")):
            connection.request(method, path)
            response = connection.getresponse()
            page = response.read().decode(errors="replace")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["X-Frame-Options"] == "DENY"
            policy = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
            if path == "/":
                (nonce,) = set(re.findall(r'<(?:script|style) nonce="([^"]+)">', page))
                assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonce}'"
    assert nonce.encode() not in answered(address, "GET", "/")[1]  # another one each time


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 address of its own")
def test_it_answers_at_an_ipv6_address(run):
    with served(run, "--host=::1", "--no-samples") as (_, url):
        assert url.startswith("http://[::1]:")
        assert answered(url, "GET", "/")[0] == 200
        assert answered(url, "POST", "/predict", file_of(NOISE), Origin=url)[0] == 200
        for host, status in (("localhost", 200), ("evil.example", 400), ("[::2]", 400)):
            assert answered(url, "GET", "/", Host=host)[0] == status


def test_idle_connections_do_not_stop_it_and_are_closed(address):
    place, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        idle = []
        for count in (120, serve.MAX_CONNECTIONS + 20):
            while len(idle) < count:
                idle.append(stack.enter_context(socket.create_connection((place, int(port)), timeout=60)))
                if len(idle) % 2:
                    idle[-1].sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 9\r\n\r\nx")  # and no more
            assert answered(address, "GET", "/")[0] == 200
        assert {connection.recv(1) for connection in idle} == {b""}  # closed by the server


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process's memory")
def test_the_largest_picture_takes_less_than_a_gigabyte_and_gives_it_back(run):
    def uploads(side):
        transparent = np.full((side, side, 4), 100, np.uint8)
        pictures = [file_of(transparent), file_of(transparent, "WEBP", lossless=True, method=0)]
        return [*pictures, file_of(transparent[..., :3], "JPEG", progressive=True, subsampling=0)]

    with served(run, "--no-samples") as (process, url), ThreadPoolExecutor(4) as pool:

        def statuses(uploads):
            return list(pool.map(lambda upload: answered(url, "POST", "/predict", upload)[0], uploads))

        assert statuses(uploads(64) * 4) == [200] * 12  # decoders and threads stay in memory once they were used
        before = psutil.Process(process.pid).memory_info().rss
        assert statuses(uploads(int(serve.MAX_PIXELS**0.5)) * 2) == [200] * 6
        assert psutil.Process(process.pid).memory_info().rss < 1.1 * before
        peak_kib = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]
        assert int(peak_kib) < 1_000_000


def test_it_listens_to_this_machine_alone_unless_told_otherwise_answers_many_at_once_and_ctrl_c_ends_it(run):
    with served(run, "--no-samples") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        assert b"test images" not in answered(url, "GET", "/")[1]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: answered(url, "POST", "/predict", file_of(NOISE)), range(40)))
        assert {status for status, _ in answers} == {200}
        assert len({body for _, body in answers}) == 1
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
        assert (process.returncode, stderr) == (-signal.SIGINT, "")
    with served(run, "--host=0.0.0.0", "--no-samples") as (process, url):
        assert url.startswith("http://0.0.0.0:")
        process.kill()
        assert (
            process.stderr.read() == "warning: 0.0.0.0 can be reached by other machines, and the page has no password\n"
        )


def test_mistakes_are_one_line_and_loading_does_not_come_first(run, tmp_path, address):
    begun = time.monotonic()
    port = address.rpartition(":")[2]
    assert_user_error(launch(run, f"--port={port}", program=DEMO), f"--port {port}", "in use", "--port=0")
    assert time.monotonic() - begun < 20
    assert_user_error(launch(tmp_path / "nowhere", "--port=0", program=DEMO), "holds no run with checkpoints")


@pytest.mark.parametrize(
    ("host", "address", "hosts"),
    [
        ("127.0.0.1", "127.0.0.1", {"localhost", "127.0.0.1"}),
        ("MyMachine", "127.0.1.1", {"localhost", "127.0.1.1", "mymachine"}),  # as Debian names a machine
        ("ip6-localhost", "::1", {"localhost", "::1", "ip6-localhost"}),
        ("0.0.0.0", "0.0.0.0", None),
    ],
)
def test_requests_may_use_the_name_that_was_given(host, address, hosts):
    assert serve._hosts(host, address) == hosts


MISTAKES = {
    "a port that there is not": (["{run}", "--port=99999"], "--port 99999"),
    "a host that there is not": (["{run}", "--host=no.such.host.invalid"], "--host no.such.host.invalid"),
    "a host that is none": (["{run}", "--host=" + "a" * 300], "give an address of this machine, such as 127.0.0.1"),
    "no such checkpoint": (["{run}", "--port=0", "--checkpoint=7"], "no checkpoint of step 7"),
    "no weights": (["{run}/model.stablehlo", "--port=0"], "a .stablehlo holds a program without weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(run, model, capsys, mistake):
    export.write(model, "stablehlo", run / "model.stablehlo")
    capsys.readouterr()
    arguments, words = MISTAKES[mistake]
    line = mistake_of_tool(capsys, "serve", *(argument.format(run=run) for argument in arguments))
    assert words in line


def test_data_that_are_gone_are_named(model, tmp_path):
    config = model.config.copy_and_resolve_references()
    config.data.name = f"npz:{tmp_path}/gone.npz"
    with pytest.raises(UserError, match=r"gone\.npz is not a file.*--no-samples"):
        serve.samples(SimpleNamespace(config=config))


def test_data_of_other_classes_are_refused(model):
    other = SimpleNamespace(config=model.config, class_names=("cat", "dog"))
    with pytest.raises(UserError, match=r"digits has changed since the run started: its classes differ.*--no-samples"):
        serve.samples(other)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 2.0])
def test_ctrl_c_while_it_loads_ends_it_without_a_word(run, seconds):
    process = start(run, "--port=0", program=DEMO)
    deadline = time.monotonic() + 60
    while not psutil.Process(process.pid).net_connections():  # it has begun
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert stderr == ""


def test_without_flask_the_message_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "waitress", None)
    with pytest.raises(SystemExit) as stop:
        tool("serve", run)
    assert stop.value.code == 2
    assert "pip install 'resnet_jax[demo]'" in capsys.readouterr().err


# In a browser


@contextlib.contextmanager
def in_thread(app):
    """A server of an app in this process: its address."""
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown_rows(page):
    """The classes and shares that are shown, once they are."""
    page.wait_for_selector("#result:not([hidden]):not([aria-busy=true]) li")
    return [row.split("\n") for row in page.locator("#result li").all_inner_texts()]


@browser.needed
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (390, "dark")])
def test_a_picture_is_uploaded_and_its_result_shown(address, model, tmp_path, width, scheme):
    (tmp_path / "noise.png").write_bytes(file_of(NOISE))
    with browser.opened(address, scheme, width) as (page, said):
        assert browser.width_of(page) == width
        assert not page.is_visible("#result")
        tops = [round(button.bounding_box()["y"]) for button in page.locator(".samples button").all()]
        assert {tops.count(top) for top in tops} == {4 if width == 390 else 6}  # all rows are full
        page.set_input_files("input[type=file]", tmp_path / "noise.png")
        rows = shown_rows(page)
        assert not page.is_visible("#verdict")  # nobody knows the true class
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert len(browser.images_loaded(page)) == 14
        assert browser.width_of(page) == width
        side = [page.locator(f"#{name}").bounding_box() for name in ("seen", "saliency")]
        bars = page.locator("#result ol").bounding_box()
        assert (side[0]["y"] > bars["y"] + bars["height"]) == (width == 390)  # under the bars, or beside them
    probabilities = model.predict(NOISE).probabilities[0]
    order = np.argsort(-probabilities)[:5]
    assert [row[0] for row in rows] == [str(i) for i in order]
    assert [row[1] for row in rows] == [f"{100 * p:.1f} %" for p in probabilities[order]]
    assert all(line.startswith(address) for line in said), said  # nothing else is asked for, nothing fails


@browser.needed
def test_test_images_are_clicked_and_pictures_dropped(address, model, digits):
    with browser.opened(address) as (page, _):
        page.click(".samples button:nth-child(4)")
        image = digits.images[digits.labels.tolist().index(3)]
        assert shown_rows(page)[0][0] == model.predict(image).names[0]
        page.evaluate("document.querySelector('#result').hidden = true")
        data = base64.b64encode(file_of(NOISE)).decode()
        page.evaluate(
            """async data => {
                const dropped = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
                dropped.items.add(new File([bytes], "noise.png"));
                document.querySelector(".drop").dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, bubbles: true}));
            }""",
            data,
        )
        assert shown_rows(page)[0][0] == model.predict(NOISE).names[0]


@browser.needed
def test_the_page_says_whether_the_answer_for_a_test_image_is_right(model, digits):
    predicted = model.predict(digits.images[0]).names[0]
    png = file_of(digits.images[0])
    other = str((int(predicted) + 1) % 10)
    app = serve.make_app(model, "run", [serve.Sample(predicted, png), serve.Sample(other, png)])
    with in_thread(app) as url, browser.opened(url) as (page, _):
        for n, words in ((1, f"Right: predicted {predicted}"), (2, f"Wrong: predicted {predicted}, true {other}")):
            page.click(f".samples button:nth-child({n})")
            page.wait_for_function("text => document.querySelector('#verdict').textContent === text", arg=words)
            assert page.is_visible("#verdict")


@browser.needed
def test_a_file_that_is_no_picture_or_too_large_gets_a_message(address, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(serve.MAX_BYTES + 1))
    with browser.opened(address, width=390) as (page, _):
        for name, message in (("notes.txt", NO_PICTURE), ("large.png", "This file is larger than 10 MB.")):
            page.set_input_files("input[type=file]", tmp_path / name)
            page.wait_for_function("text => document.querySelector('#error').textContent === text", arg=message)
            assert page.is_visible("#error")
            assert not page.is_visible("#result")
            assert not page.is_visible("#busy")
            assert browser.width_of(page) == 390
        page.click(".samples button")
        shown_rows(page)
        assert not page.is_visible("#error")


@browser.needed
def test_a_server_that_has_ended_is_told(run, tmp_path):
    (tmp_path / "noise.png").write_bytes(file_of(NOISE))
    with served(run, "--no-samples") as (process, url), browser.opened(url) as (page, _):
        process.kill()
        process.wait()
        page.set_input_files("input[type=file]", tmp_path / "noise.png")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error") == "The server does not reply. Is it still running?"


@browser.needed
def test_it_shows_that_it_is_at_work_and_no_older_error(model, tmp_path, monkeypatch):
    answers = threading.Semaphore(0)

    def slowly(*arguments, answer=serve.answer):
        answers.acquire()
        return answer(*arguments)

    monkeypatch.setattr(serve, "answer", slowly)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "noise.png").write_bytes(file_of(NOISE))
    with in_thread(serve.make_app(model, "run", [])) as url, browser.opened(url) as (page, _):
        page.set_input_files("input[type=file]", tmp_path / "notes.txt")
        page.wait_for_selector("#error:not([hidden])")
        page.set_input_files("input[type=file]", tmp_path / "noise.png")
        page.wait_for_selector("#busy:not([hidden])")
        assert not page.is_visible("#error")
        answers.release()
        shown_rows(page)
        assert not page.is_visible("#busy")


@browser.needed
@pytest.mark.parametrize("width", [320, 1400])
def test_long_names_do_not_widen_the_page(model, tmp_path, width):
    names = ("a" * 250, *map(str, range(1, 10)))
    named = trained_model.Model(model.config, names, model.image_shape, model.variables, model.step)
    shown = [serve.Sample(names[0], file_of(NOISE))] * 3
    page = serve.make_app(named, "adamw_lr0.0030_wd0.0100_warm0.55_seed1" * 3, shown).test_client().get("/").text
    (tmp_path / "page.html").write_text(page)
    with browser.opened((tmp_path / "page.html").as_uri(), width=width) as (opened, _):
        assert browser.width_of(opened) == width
        heights = {round(button.bounding_box()["height"]) for button in opened.locator(".samples button").all()}
        assert max(heights) < 180
