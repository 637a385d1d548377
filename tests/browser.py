"""A page of ours in headless Chromium."""

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needed = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed here: there is nothing to show the page")


def images_shown(page: Path, scheme: str, width: int) -> int:
    """Show a page of figures on a light or dark screen: whole, in the scheme's colours, without errors or requests.

    Returns:
        How many pictures it has.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    said = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*quiet, "--disable-sync", "--no-first-run"]
        )
        shown = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        shown.goto(page.as_uri())
        images = shown.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
        page_width = shown.evaluate("document.documentElement.scrollWidth")
        columns = shown.evaluate(
            "getComputedStyle(document.querySelector('.figures')).gridTemplateColumns.split(' ').length"
        )
        screenshot = shown.screenshot()
        browser.close()
    assert said == []
    assert all(images)
    assert page_width == width
    assert columns == (1 if width == 390 else 2)
    with Image.open(io.BytesIO(screenshot)) as image:
        corner = image.convert("L").getpixel((2, 2))
    assert corner > 200 if scheme == "light" else corner < 50
    return len(images)
