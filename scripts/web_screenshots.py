"""Pictures of the web page, made by a real browser: docs/web_*.png.

    python scripts/web_screenshots.py        # needs Chromium and playwright
    python scripts/web_screenshots.py --save_dir out --out /tmp/pictures

Needs `pip install playwright` (it is in requirements-dev.txt) and a `chromium` on the path (`apt
install chromium`).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.runtime.arguments import arg, command, parse_args

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, NARROW = (1440, 900), (390, 844)
DRAWN = ", ".join(
    f"[data-testid=stMain] [data-testid={part}]"
    for part in ("stHeading", "stAlert", "stVegaLiteChart")
)
QUIET = """--no-sandbox --disable-gpu --disable-background-networking --disable-component-update
--disable-sync""".split()


@dataclass
class PictureArgs:
    save_dir: str = arg(str(ROOT / "out"), "folder with the runs to show")
    out: str = arg(str(ROOT / "docs"), "where to write the pictures")

    def check(self) -> None:
        if not shutil.which("chromium"):
            raise ValueError("no chromium is on the path: install it (apt install chromium)")


@contextmanager
def served(
    save_dir: str | Path,
    script: Path = ROOT / "scripts/web_demo.py",
    by_streamlit: bool = False,
    patience: float = 60,
) -> Iterator[str]:
    """The address of a page that serves `save_dir`; by_streamlit: started by `streamlit run`."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    start = [str(script), "--port", str(port)]
    if by_streamlit:
        start = ["-m", "streamlit", "run", str(script), "--server.headless=true"]
        start += ["--server.address=127.0.0.1", f"--server.port={port}", "--"]
    argv = [sys.executable, *start, "--save_dir", str(save_dir)]
    process = subprocess.Popen(argv, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health", process, patience)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(address: str, process: subprocess.Popen, patience: float) -> None:
    """Return once the address answers; RuntimeError if the process ends or `patience` runs out."""
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).read()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the page did not start at {address}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that reaches out to nothing."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    with sync_playwright() as it, it.chromium.launch(executable_path=path, args=QUIET) as browser:
        yield browser


def open_page(
    browser: Browser,
    address: str,
    size: tuple[int, int] = WIDE,
    language: str = "en",
    scheme: str = "light",
) -> Page:
    """A visitor's page, once it has been drawn."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, locale="en-US"
    )
    page = context.new_page()
    page.goto(f"{address}?lang={language}")
    page.locator(DRAWN).first.wait_for(timeout=60_000)
    return page


def ask(page: Page, text: str) -> None:
    """Type a message and wait until the answer is there."""
    page.locator("[data-testid=stChatInput] textarea").fill(text)
    page.keyboard.press("Enter")
    page.get_by_text(text).first.wait_for()
    page.wait_for_timeout(1000)
    page.locator(".st-key-stop").wait_for(state="detached", timeout=60_000)


def shoot(page: Page, path: str) -> None:
    """Write a picture of the page to a file, with nothing under the mouse."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(f"{path}: {Path(path).stat().st_size / 1000:.0f} kB")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(PictureArgs, argv)
    with served(args.save_dir) as address, chromium() as browser:
        page = open_page(browser, address)
        page.get_by_role("button", name="Use the calculator").click()
        page.get_by_role("button", name="Regenerate").wait_for(timeout=60_000)
        page.get_by_role("button", name="Clear all").click()
        ask(page, "Who are you?")
        shoot(page, f"{args.out}/web_chat.png")

        page = open_page(browser, address, NARROW, "zh")
        page.get_by_role("button", name="12 加 7 等于多少？").click()
        page.get_by_role("button", name="重新生成").wait_for(timeout=60_000)
        shoot(page, f"{args.out}/web_chat_narrow_zh.png")

        page = open_page(browser, f"{address}/compare", language="zh")
        ask(page, "你是谁？")
        ask(page, "12 加 7 等于多少？")
        shoot(page, f"{args.out}/web_compare_zh.png")

        page = open_page(browser, f"{address}/curves", scheme="dark")
        shoot(page, f"{args.out}/web_curves_dark.png")


if __name__ == "__main__":
    command(main)
