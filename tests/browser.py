"""Pages of ours in headless Chromium."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needed = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed here: there is nothing to show the page")


SCREENS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    sync_api = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*quiet, "--disable-sync", "--no-first-run"]
        )
        yield browser
        browser.close()


def show(browser: Any, url: str, scheme: str, width: int) -> tuple[Any, list[str]]:
    """A page on a light or dark screen, and a list to which its errors and the addresses that it asks for are added."""
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(url)
    return page, said


@contextlib.contextmanager
def opened(url: str, scheme: str = "light", width: int = 1000) -> Iterator[tuple[Any, list[str]]]:
    """What `show` returns, in a browser of its own."""
    with chromium() as browser:
        yield show(browser, url, scheme, width)


def width_of(page: Any) -> int:
    """The width that a page takes, in pixels: more than the screen's where it can be scrolled aside."""
    return int(page.evaluate("document.documentElement.scrollWidth"))


def images_loaded(page: Any) -> list[bool]:
    """Of each picture whether it is there."""
    return list(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)"))


def images_shown(page: Path) -> int:
    """Show a page of figures on narrow and wide, light and dark screens: whole, in their colours, without errors or requests.

    Returns:
        How many pictures it has.
    """
    counts = set()
    with chromium() as browser:
        for width, scheme in SCREENS:
            shown, said = show(browser, page.as_uri(), scheme, width)
            images = images_loaded(shown)
            page_width = width_of(shown)
            columns = shown.evaluate(
                "getComputedStyle(document.querySelector('.figures')).gridTemplateColumns.split(' ').length"
            )
            screenshot = shown.screenshot()
            shown.close()
            assert said == []
            assert all(images)
            assert page_width == width
            assert columns == (1 if width == 390 else 2)
            with Image.open(io.BytesIO(screenshot)) as image:
                corner = image.convert("L").getpixel((2, 2))
            assert corner > 200 if scheme == "light" else corner < 50
            counts.add(len(images))
    (count,) = counts
    return count
