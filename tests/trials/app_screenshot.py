"""The picture of `faic app` that README shows: the page after it has colorized its three examples.

    python tests/trials/app_screenshot.py figures/app.png

The model is the page's default: the released one, else the newest run. This needs the
extra `app`, playwright from the package index, and a Chromium in PATH. A file that is there already stays.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, process, seconds=300):
    """Return when a server answers."""
    for _ in range(seconds):
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            if process.poll() is not None:
                sys.exit("faic app has ended: its message is above")
            time.sleep(1)
    sys.exit(f"faic app gave no answer in {seconds} s")


def take_picture(url, file, width):
    """Colorize the examples in a browser, and save what it shows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.goto(url)
        page.click("#faic-example")
        page.wait_for_function("document.querySelector('#faic-drop').innerText.includes('chelsea')")
        page.click("#faic-start")
        page.wait_for_selector("#faic-gallery img", timeout=300_000)
        page.wait_for_timeout(2000)  # the pictures are loaded, and the progress bar is gone
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a new PNG")
    parser.add_argument("--width", type=int, default=1000, help="of the page, px")
    a = parser.parse_args()
    if a.file.exists():
        sys.exit(f"{a.file} is there already and is not replaced; move it, or give another name")
    port = free_port()
    with tempfile.TemporaryDirectory() as answers:
        words = ["app", "--no-browser", "--port", str(port), "--answers", answers]
        server = subprocess.Popen([sys.executable, "-m", "faic", *words])
        try:
            wait_for(f"http://127.0.0.1:{port}", server)
            take_picture(f"http://127.0.0.1:{port}", a.file, a.width)
        finally:
            server.terminate()
            server.wait(20)
    print(a.file)
