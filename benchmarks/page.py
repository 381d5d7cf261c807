"""The picture of the chat page in docs/serving.md: a question asked in headless Chromium, with vanilla beside it.

PYTHONPATH=. python benchmarks/page.py http://127.0.0.1:8000 docs/serving/page.png
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

QUESTION = "Write a Python function that adds two numbers, then the same function with a docstring."


def main(url: str, file: str) -> None:
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 760}, color_scheme="light", device_scale_factor=1.5)
        page.goto(url)
        page.wait_for_selector("#dot.ready")
        page.check("#compare")
        page.fill("#limit", "120")
        page.fill("#seed", "1")
        page.fill("#prompt", QUESTION)
        page.keyboard.press("Enter")
        expect(page.locator(".verdict")).to_be_visible(timeout=600_000)
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
