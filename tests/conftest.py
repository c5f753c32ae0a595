"""What all tests share: property tests without a clock, with the same examples in continuous integration; a browser."""

import os
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # those of the model and the kernels run without it
    pass
else:
    settings.register_profile("glm45", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("glm45")

CHROMIUM = os.environ.get("GLM45_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for pages. Needs playwright's Python package: skips without either."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no chromium at {CHROMIUM}: install one, or set GLM45_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
