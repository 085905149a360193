"""The pages of MLflow and Prefect in a real browser: what people look for is there."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from diffusion.evaluation.figures import FIGURES
from diffusion.tracking.pages import runs_page
from diffusion.trust.private import write_private
from tests.conftest import PATIENCE
from tests.running import SCRIPT, Training
from tests.stack import Project

pytestmark = pytest.mark.slow

MODEL = "generated-fields-and-water-ddpm"
PAGE_PATIENCE = 1000 * PATIENCE  # ms


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium: the system's, or the one that `playwright install chromium` has fetched."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    expect.set_options(timeout=PAGE_PATIENCE)
    with sync_playwright() as playwright:
        if found is None and not shutil.which(playwright.chromium.executable_path):
            pytest.skip("no Chromium: install your system's, or run playwright install chromium")
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"], timeout=PAGE_PATIENCE
        )
        yield browser
        browser.close()


def password(stack: Project) -> str:
    return stack.servers["MLFLOW_TRACKING_PASSWORD"]


STILL = """
new MutationObserver((_, watch) => {
  if (!document.head) return
  const still = document.createElement('style')
  still.textContent = '*, ::before, ::after { animation: none !important; transition: none !important }'
  document.head.append(still)
  watch.disconnect()
}).observe(document, {childList: true, subtree: true})
"""
"""Without a GPU whatever moves is drawn by the processor, all the time that is waited. (Prefect's dialogs would not close.)"""


@pytest.fixture
def mlflow_page(browser: Browser, stack: Project, training: Training) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 1440, "height": 1100},
        reduced_motion="reduce",
        http_credentials={"username": "admin", "password": password(stack)},
    )
    context.add_init_script(STILL)
    context.set_default_timeout(PAGE_PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture
def prefect_page(browser: Browser, stack: Project, training: Training) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 1400}, reduced_motion="reduce")
    context.set_default_timeout(PAGE_PATIENCE)
    # What the login form keeps, before the page's own code runs: whenever an answer without it comes late, it throws it away.
    secret = json.dumps(f"admin:{password(stack)}")
    context.add_init_script(f"localStorage.setItem('prefect-password', btoa({secret}))")
    yield context.new_page()
    context.close()


def mlflow_address(stack: Project) -> str:
    return f"{stack.servers['MLFLOW_TRACKING_URI']}/#"


def prefect_address(stack: Project) -> str:
    return stack.servers["PREFECT_API_URL"].removesuffix("/api")


def ask(stack: Project, url: str, body: dict[str, Any]) -> Any:
    answer = requests.post(url, json=body, auth=("admin", password(stack)), timeout=PATIENCE)
    answer.raise_for_status()
    return answer.json()


def run_of(stack: Project, dataset: str) -> Any:
    """The MLflow run that was trained on it."""
    wanted = {"experiment_ids": ["1"], "filter": f"tags.`dataset.name` = '{dataset}'"}
    (run,) = ask(stack, f"{stack.servers['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/runs/search", wanted)["runs"]
    return run


@pytest.fixture
def run(stack: Project, training: Training) -> dict[str, Any]:
    """The MLflow run."""
    return dict(run_of(stack, "generated-fields-and-water")["info"])


def test_the_run_page_of_mlflow(mlflow_page: Page, stack: Project, run: dict[str, Any]) -> None:
    experiment = f"{mlflow_address(stack)}/experiments/{run['experiment_id']}"
    mlflow_page.goto(f"{experiment}/runs")
    mlflow_page.get_by_role("link", name=run["run_name"]).first.wait_for()
    mlflow_page.goto(f"{experiment}/runs/{run['run_id']}")
    for text in (
        "Finished",
        f"{MODEL}",
        "score/fid_eurosat",
        "data.images",
        "Version 1 became",
        "optimizer.learning_rate",
    ):
        mlflow_page.get_by_text(text).first.wait_for()
    mlflow_page.set_viewport_size({"width": 1440, "height": 4500})  # what is below the screen is not drawn
    mlflow_page.goto(f"{experiment}/runs/{run['run_id']}/model-metrics")
    scores = [figure for figure in FIGURES.values() if figure.place in ("headline", "score")]
    for text in ("fid_eurosat", "bits_per_dim", f"({len(scores)})"):  # the section has them all
        mlflow_page.get_by_text(text, exact=True).first.wait_for()
    slider = mlflow_page.get_by_role("slider").first
    shown = []
    for step in (0, 8, 16):  # the noise, and the two milestones
        expect(slider).to_have_attribute("aria-valuenow", str(step))
        grid = mlflow_page.locator(f"img[src*='samples%2Bstep%2B{step}%2B']")
        grid.wait_for()
        shown.append(grid.evaluate("async one => { await one.decode(); return one.naturalWidth }"))
        slider.press("ArrowRight")
    assert min(shown) > 300
    mlflow_page.set_viewport_size({"width": 1440, "height": 1100})
    mlflow_page.goto(f"{experiment}/runs/{run['run_id']}/system-metrics")
    mlflow_page.get_by_text("cpu_utilization_percentage").first.wait_for()
    mlflow_page.goto(f"{experiment}/runs/{run['run_id']}/artifacts/gallery.html")
    inside = mlflow_page.frame_locator("iframe")
    inside.get_by_role("heading", name="Samples and real images").wait_for()
    inside.get_by_role("heading", name="Promotion").wait_for()


def test_the_table_of_runs_that_our_links_open(mlflow_page: Page, stack: Project, run: dict[str, Any]) -> None:
    mlflow_page.goto(f"{stack.servers['MLFLOW_TRACKING_URI']}/{runs_page(run['experiment_id'])}")
    mlflow_page.get_by_role("link", name=run["run_name"]).first.wait_for()
    for text in ("Duration", "score/bits_per_dim", "score/fid_eurosat"):
        mlflow_page.get_by_role("columnheader", name=text).first.wait_for()


def test_the_model_page_of_mlflow(mlflow_page: Page, stack: Project) -> None:
    mlflow_page.goto(f"{mlflow_address(stack)}/models/{MODEL}")
    mlflow_page.get_by_text("@ champion").first.wait_for()
    mlflow_page.get_by_text(re.compile(r"# fid_eurosat [0-9.]+")).first.wait_for()
    mlflow_page.goto(f"{mlflow_address(stack)}/models/{MODEL}/versions/1")
    for text in ("Reproduce", "Limits", "Lineage", "It is the first version"):
        mlflow_page.get_by_text(text).first.wait_for()


def test_the_flow_run_page_of_prefect(prefect_page: Page, stack: Project, run: dict[str, Any]) -> None:
    api = stack.servers["PREFECT_API_URL"]
    (flow_run,) = ask(stack, f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": [run["run_name"]]}}})
    prefect_page.goto(f"{prefect_address(stack)}/runs/flow-run/{flow_run['id']}")
    prefect_page.get_by_text(flow_run["name"]).first.wait_for()
    prefect_page.get_by_text("Completed").first.wait_for()
    prefect_page.locator("#task-runs").click()
    for name in ("train to step 16", "evaluate step 16", "promote version 1", "report"):
        prefect_page.get_by_text(name).first.wait_for()
    of_it = {"key": {"any_": ["report"]}, "flow_run_id": {"any_": [flow_run["id"]]}}
    (artifact,) = ask(stack, f"{api}/artifacts/filter", {"artifacts": of_it})
    prefect_page.goto(f"{prefect_address(stack)}/artifacts/artifact/{artifact['id']}")
    prefect_page.get_by_role("link", name="Gallery").wait_for()
    prefect_page.get_by_text("bits_per_dim is below that of no model").wait_for()
    prefect_page.wait_for_function("[...document.images].some(one => one.naturalWidth > 300)")


def test_the_recipe_is_one_click_from_the_deployment(prefect_page: Page, stack: Project) -> None:
    prefect_page.goto(f"{prefect_address(stack)}/deployments/deployment/{deployment(stack)['id']}?tab=Description")
    with prefect_page.context.expect_page() as opened:
        prefect_page.get_by_role("link", name="the recipe").click()
    for text in ("the U-Net's size", "Images a step, over all processes together."):
        opened.value.get_by_text(text).first.wait_for()


EVIL = f"<p>It is shown. {SCRIPT}<script>alert(3); try {{ parent.document.title = 'taken' }} catch {{}}</script></p>"


def deployment(stack: Project) -> Any:
    answer = requests.get(
        f"{prefect_address(stack)}/api/deployments/name/train-diffusion/train-diffusion",
        auth=("admin", password(stack)),
        timeout=PATIENCE,
    )
    return answer.json()


def until_taken(page: Page, change: Callable[[], None]) -> None:
    """Change something on Prefect's page; again where its database was busy: programs ask again by themselves, pages don't."""
    for _ in range(10):
        with page.expect_response(lambda answer: answer.request.method == "PATCH", timeout=PAGE_PATIENCE) as answered:
            change()
        if answered.value.status != 503:
            assert answered.value.ok, answered.value.text()
            return
        page.reload()
    raise AssertionError("its database was busy ten times")


@pytest.mark.last(1)
def test_a_night_is_moved_and_paused_by_the_page(prefect_page: Page, stack: Project) -> None:
    """It keeps its time zone and is still one of the scheduler's, with the deployment's parameters."""
    before = deployment(stack)
    (night,) = before["schedules"]
    prefect_page.goto(f"{prefect_address(stack)}/deployments/deployment/{before['id']}")
    deadline = time.monotonic() + PATIENCE
    hour = (datetime.now(UTC).hour + 12) % 24  # or a night might begin

    def move() -> None:
        prefect_page.locator(".deployment-schedule__menu").click()
        prefect_page.locator(".p-overflow-menu-item", has_text="Edit").first.click()
        dialog = prefect_page.locator(".p-modal").filter(has_text="Edit schedule")
        # The field of the cron string has no name of its own.
        while not (
            fields := [one for one in dialog.locator("input").all() if one.input_value() == night["schedule"]["cron"]]
        ):
            assert time.monotonic() < deadline, "the dialog does not show the schedule"
            prefect_page.wait_for_timeout(200)
        (cron,) = fields
        cron.fill(f"30 {hour} * * *")
        dialog.get_by_role("button", name="Save").click()
        expect(dialog).to_have_count(0)

    until_taken(prefect_page, move)
    moved = deployment(stack)["schedules"][0]
    same = ("id", "slug", "active", "parameters")
    assert {key: moved[key] for key in same} == {key: night[key] for key in same}
    assert moved["schedule"] == night["schedule"] | {"cron": f"30 {hour} * * *"}
    wanted = {
        "deployments": {"id": {"any_": [before["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    due: list[dict[str, Any]] = []
    while not due or not all(f"T{hour:02}:30" in run["expected_start_time"] for run in due):
        assert time.monotonic() < deadline, due
        prefect_page.wait_for_timeout(500)  # the scheduler looks every few seconds
        due = ask(stack, f"{prefect_address(stack)}/api/flow_runs/filter", wanted)
    assert all(run["tags"] == ["auto-scheduled"] and run["parameters"] == before["parameters"] for run in due)
    until_taken(prefect_page, prefect_page.locator(".deployment-schedule-card .p-toggle__control").click)
    assert not deployment(stack)["schedules"][0]["active"]


def test_no_script_from_names_or_artifacts_runs_in_a_browser(
    browser: Browser, stack: Project, own_images: str, mlflow_page: Page, prefect_page: Page
) -> None:
    ran: list[str] = []

    def refuse(dialog: Dialog) -> None:
        ran.append(dialog.message)
        dialog.dismiss()

    api, run = stack.servers["PREFECT_API_URL"], run_of(stack, "my-images")
    (folder,) = (stack.folder / "var/mlflow/artifacts").glob(f"*/{run['info']['run_id']}/artifacts")
    assert "onerror" in (folder / "gallery.html").read_text(), "the class has its name"
    write_private(folder / "evil.html", EVIL)
    alone = browser.new_page()
    alone.set_default_timeout(PAGE_PATIENCE)
    for page in (mlflow_page, prefect_page, alone):
        page.on("dialog", refuse)
    alone.goto((folder / "gallery.html").as_uri())
    address = f"{mlflow_address(stack)}/experiments/{run['info']['experiment_id']}/runs/{run['info']['run_id']}"
    mlflow_page.goto(address)
    mlflow_page.get_by_text("data.images").first.wait_for()
    for artifact, shown in (("gallery.html", "Samples and real images"), ("evil.html", "It is shown.")):
        mlflow_page.goto("about:blank")  # else the page goes on showing the artifact before
        mlflow_page.goto(f"{address}/artifacts/{artifact}")
        mlflow_page.frame_locator("iframe").get_by_text(shown).first.wait_for()
    assert mlflow_page.title() != "taken"
    mlflow_page.goto(f"{mlflow_address(stack)}/models/my-images-ddpm/versions/1")
    mlflow_page.get_by_text("Lineage").first.wait_for()  # which comes after the names
    evil = ask(stack, f"{api}/artifacts/", {"key": "evil", "type": "markdown", "data": EVIL})
    (report, *_) = [
        one
        for one in ask(stack, f"{api}/artifacts/filter", {})
        if one["key"] == "report" and "my-images" in one["data"]
    ]
    for artifact, shown in ((evil, "It is shown."), (report, "Gallery")):
        prefect_page.goto(f"{prefect_address(stack)}/artifacts/artifact/{artifact['id']}")
        prefect_page.get_by_text(shown).first.wait_for()
    assert ran == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_gallery_on_any_width_light_and_dark(
    browser: Browser, stack: Project, run: dict[str, Any], width: int, scheme: Any
) -> None:
    (file,) = (stack.folder / "var/mlflow/artifacts").glob(f"*/{run['run_id']}/artifacts/gallery.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PAGE_PATIENCE)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    images = page.evaluate("[...document.images].map(one => one.naturalWidth)")
    assert len(images) >= 12
    assert min(images) > 200
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [], "it is not whole by itself"
    context.close()
