"""Makes the pictures of docs/commands/view.md from the images of the tour, in Chromium: `python docs/view_pictures.py`.

It needs Chromium and Playwright, as the tests of `lamina view` do.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lamina

FOLDER = Path(__file__).with_name("pictures")
MIB = 1 << 20


def make_images() -> None:
    """The two images of the tour, in the current folder: clusters of 512 bytes beneath clusters of 1 MiB."""
    lamina.create("back.qcow2", "qcow2", 100 * MIB, cluster_size=512)
    with lamina.open("back.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"\1" * 512)
        image.write(1024, b"\1" * 512)
    lamina.create("top.qcow2", "qcow2", backing_file="back.qcow2", backing_fmt="qcow2", cluster_size=MIB)


def shoot(browser: Any, page: Path, name: str, scheme: str, fragment: str, script: str, height: int) -> None:
    tab = browser.new_page(viewport={"width": 1180, "height": height}, color_scheme=scheme)
    tab.goto(page.as_uri() + fragment)
    tab.wait_for_selector("html[data-ready=true]")
    tab.evaluate(script)
    tab.screenshot(path=FOLDER / name)
    tab.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.chdir(folder)
        make_images()
        page = Path(folder) / "page.html"
        with lamina.open("top.qcow2", format="qcow2") as image:
            lamina.view(image, output=page)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shoot(browser, page, "view-disk.png", "light", "#start=0&length=16384&round=4096", "diskLanes.step(1)", 660)
        script = (
            "document.querySelector('#file [role=tab]:last-child').click(); "
            "fileLanes.choose({ track: 0, position: 0x6c00 }); "
            "document.querySelector('#disk').remove()"
        )
        shoot(browser, page, "view-file.png", "dark", "", script, 760)
        browser.close()


if __name__ == "__main__":
    main()
