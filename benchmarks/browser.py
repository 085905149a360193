"""What the benchmarks of pages share: a server, and how long a browser takes until a page shows what it is opened for."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from playwright.sync_api import sync_playwright

REPEATS = 7
READY_SECONDS = 120


@contextmanager
def server(command: list[str], health: str, env: dict[str, str] | None = None) -> Iterator[None]:
    """A server of this environment's programs, from when `health` answers to the end. Raises RuntimeError if it never does."""
    program = str(Path(sys.executable).parent / command[0])
    # They ask for no password: what they do not need, they do not get.
    given = {name: value for name, value in (env or os.environ).items() if not name.startswith("AWS_")}
    process = subprocess.Popen([program, *command[1:]], env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not answer at {health}.")
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def median(what: Callable[[], object]) -> float:
    """Median seconds of a few repetitions, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class View:
    """A page and the text that it is opened for, on a tab of it where there is one."""

    name: str
    address: str
    text: str
    tab: str = ""


def time_views(views: list[View]) -> dict[str, float]:
    """Seconds until each is shown, by its name."""
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        for view in views:

            def show(view: View = view) -> None:
                page.goto("about:blank")
                page.goto(view.address)
                if view.tab:
                    page.locator(view.tab).click()
                page.get_by_text(view.text).first.wait_for()

            found[view.name] = median(show)
        browser.close()
    return found


def print_table(one: dict[str, float], many: dict[str, float], runs: int) -> None:
    """Seconds with one run and with many, as Markdown."""
    print(f"\n| s, median of {REPEATS} | 1 run | {runs} runs | ratio |\n| --- | --- | --- | --- |")
    for name, seconds in one.items():
        print(f"| {name} | {seconds:.2f} | {many[name]:.2f} | {many[name] / seconds:.1f} |")
