"""The UI as a person uses it: Debian's Chromium, driven by Playwright, over Dagster's webserver and daemon on a real instance.

A scenario is materialized and its picture opened; another is added in the Launchpad and seen solved. Clicks go through the
UI; only what it shows nowhere to wait for (that a run ended) is asked of the instance. The engine is arithmetic.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg
import pytest
import yaml
from micro_project import CHECKOUT, Project, copy_project

CHROMIUM = os.environ.get("PUZZLE_DAG_CHROMIUM") or next((p for n in ("chromium", "chromium-browser") if (p := shutil.which(n))), None)
WAIT_S = float(os.environ.get("PUZZLE_DAG_BROWSER_WAIT_S", "240"))

playwright = pytest.importorskip("playwright.sync_api", reason="the browser test is left out: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the browser test is left out: no Chromium here (apt-get install chromium)"),
]


@dataclass
class Ui:
    project: Project
    address: str

    def wait_for_run(self, job: str, known: set[str]) -> dg.DagsterRun:
        """Wait until a run of a job that wasn't known has ended."""
        deadline_s = time.monotonic() + WAIT_S
        with self.project.instance() as instance:
            while time.monotonic() < deadline_s:
                new = [r for r in instance.get_runs(dg.RunsFilter(job_name=job)) if r.run_id not in known]
                if new and new[0].is_finished:
                    return new[0]
                time.sleep(0.5)
        raise AssertionError(f"no run of {job} ended within {WAIT_S:.0f} s")

    def known_runs(self) -> set[str]:
        with self.project.instance() as instance:
            return {run.run_id for run in instance.get_runs()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    query = b'{"query": "{ workspaceOrError { ... on Workspace { locationEntries { loadStatus } } } }"}'
    try:
        request = urllib.request.Request(f"{address}/graphql", query, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return b'"LOADED"' in response.read()
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def ui(refreshed_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    project = copy_project(refreshed_project, tmp_path_factory.mktemp("browser"))
    location = {"relative_path": str(CHECKOUT / "tests" / "ticking_location.py"), "attribute": "defs", "location_name": "micro"}
    (project.root / "workspace.yaml").write_text(yaml.safe_dump({"load_from": [{"python_file": location}]}))
    with project.instance():  # writes var/dagster/dagster.yaml
        pass
    port, log = free_port(), project.root / "dagster-dev.log"
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(project.root / "var" / "dagster"),
        "PUZZLE_DAG_ROOT": str(project.root),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")]),
    }
    command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=project.root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not answers(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-4000:]
            time.sleep(0.5)
        yield Ui(project, f"http://127.0.0.1:{port}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # where the tests run in the background, SIGINT is ignored by all that they start
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox needs rights that containers seldom give; the only pages it opens are ours.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: "playwright.Browser", ui: Ui, request: pytest.FixtureRequest) -> Iterator["playwright.Page"]:
    found = browser.new_page(viewport={"width": 1600, "height": 1000}, base_url=ui.address)
    found.set_default_timeout(1000 * min(WAIT_S, 60))
    yield found
    found.screenshot(path=ui.project.root / f"{request.node.name}.png")
    found.close()


def open_partition(page: "playwright.Page", asset: str, partition: str) -> None:
    """Click from an asset to one of its partitions."""
    page.goto(f"/assets/micro/{asset}")
    page.get_by_role("tab", name="Partitions").click()
    page.get_by_text(partition, exact=True).first.click()


def open_picture(page: "playwright.Page") -> None:
    """Open the metadata entry `picture` of the partition that is shown, and see that it is one."""
    page.locator("tr").filter(has=page.get_by_text("picture", exact=True)).get_by_text("Show Markdown").first.click()
    image = page.locator("img[src^='data:image/png;base64,']").last
    image.wait_for(state="visible")
    assert image.evaluate("image => image.complete && image.naturalWidth") > 100


def test_a_scenario_is_materialized_and_its_picture_opened(ui: Ui, page: "playwright.Page") -> None:
    known = ui.known_runs()
    page.goto("/assets/micro/solution")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_text("Select a partition or create one").click()
    page.locator("label").filter(has_text="micro-small").first.click()
    page.get_by_text("Launch runs to materialize").first.click()  # closes the list
    page.get_by_role("button", name="Launch 1 run").click()
    run = ui.wait_for_run("__ASSET_JOB", known)
    assert run.is_success and run.tags["dagster/partition"] == "micro-small"
    open_partition(page, "solution", "micro-small")
    open_picture(page)


def test_a_scenario_added_in_the_launchpad_is_solved(ui: Ui, page: "playwright.Page") -> None:
    known = ui.known_runs()
    page.goto("/jobs")
    page.get_by_role("link", name="add_scenario_micro_job").first.click()
    page.get_by_role("tab", name="Launchpad").click()
    page.locator(".CodeMirror").first.click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(
        "{ops: {add_scenario_micro: {config: {name: from-the-browser, target: micro-eager, uptrain: {tokens: 64}, "
        "constraints: {parameters: {at_most: 0.9, relative_to: parent}}, retention_floor: 0.01}}}}"
    )
    page.get_by_role("button", name="Launch run", exact=False).last.click()
    run = ui.wait_for_run("add_scenario_micro_job", known)
    assert run.is_success
    assert ui.project.workspace.read_scenario("from-the-browser").constraints["parameters"].at_most == 0.9
    open_partition(page, "uptrained_child", "from-the-browser")
    open_partition(page, "solution", "from-the-browser")
    open_picture(page)
