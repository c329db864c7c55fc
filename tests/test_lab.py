"""JupyterLab, driven as a reader would: it opens the tour, runs its first half, and a slider moves a figure."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
TOUR = "start/00_tour.ipynb"

if not importlib.util.find_spec("jupyterlab"):
    pytest.skip("needs JupyterLab", allow_module_level=True)


def address(server, runtime, log):
    "Where the server listens, once it does."
    for _ in range(300):
        for info in runtime.glob("jpserver-*.json"):
            return json.loads(info.read_text())["url"]
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab on a copy of the chapters, without the tour's outputs, with settings of its own."
    nbs, runtime, log = (tmp_path / name for name in ("nbs", "runtime", "log"))
    shutil.copytree(ROOT / "nbs", nbs, ignore=shutil.ignore_patterns(".*"))
    tour = nbformat.read(nbs / TOUR, 4)
    for cell in tour.cells:
        cell |= {"outputs": [], "execution_count": None} if cell.cell_type == "code" else {}
    nbformat.write(tour, nbs / TOUR)
    env = dict(os.environ, PYTHONPATH=str(ROOT), MATPLOTLIBRC=str(ROOT / "tools/matplotlibrc"))
    env.pop("MPLBACKEND", None)  # the kernel's own, which shows figures
    env["JUPYTER_RUNTIME_DIR"] = str(runtime)
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    env |= {home: str(tmp_path / home) for home in homes}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", f"--notebook-dir={nbs}"]
    command += ["--IdentityProvider.token=", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield address(server, runtime, log)
    finally:
        server.terminate()  # the server ends its kernels
        server.wait(30)


@pytest.fixture
def tab(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 2000})
    page.set_default_timeout(300_000)
    yield page
    page.close()


LOOKS = "e => e.src || e.outerHTML"
MOVED = """before => {
  const e = [...document.querySelector('.widget-interact').querySelectorAll('img, svg')].pop();
  return e && (e.src || e.outerHTML) !== before;
}"""
HALF = "tour-aware"  # the text after the first model that calibration data helped to round
DONE = """n => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent);
  return prompts.length > n && prompts.slice(0, n).every(text => /\\[\\d+\\]/.test(text));
}"""  # not [*], which waits or runs, and not [ ], which has not been run


def test_the_tour_runs_in_jupyterlab(tab, lab):
    tab.goto(f"{lab}lab/tree/{TOUR}?reset")
    tab.wait_for_selector(".jp-Notebook .jp-CodeCell")
    tab.wait_for_selector("#jp-main-statusbar >> text=| Idle")  # earlier, JupyterLab would ask for a kernel
    cells = nbformat.read(ROOT / "nbs" / TOUR, 4).cells
    half = [c.id for c in cells].index(HALF)
    tab.click(f"h2:has-text('{cells[half].source.splitlines()[0].strip('# ')}')")
    tab.click(".lm-MenuBar-item:has-text('Run')")
    tab.click(".lm-Menu-item[data-command='notebook:run-all-above']")
    run = [c for c in cells[:half] if c.cell_type == "code"]
    tab.wait_for_function(DONE, arg=len(run))
    assert tab.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    measured = [c.id for c in run].index("tour-measure")  # to the nearest values, which are the same on all machines
    shown = tab.locator(".jp-CodeCell").nth(measured).locator(".jp-OutputArea-output").last.inner_text()
    assert shown.split() == run[measured].outputs[-1].text.split()
    assert tab.locator(".jp-OutputArea-output").last.inner_text().startswith("GPTQ")
    figure = tab.locator(".jp-OutputArea-output :is(img, svg)").first
    assert figure.bounding_box()["height"] > 100
    move_a_slider(tab)
    tab.screenshot(path=ROOT / "build/screenshots/lab.png")


def move_a_slider(tab):
    "The figure below the first slider, which stands at 2 bits, is drawn anew when the slider is moved."
    box = tab.locator(".widget-interact").first
    figure = box.locator(":is(img, svg)").last
    before = figure.evaluate(LOOKS)
    box.locator("[role=slider]").first.press("ArrowRight")
    tab.wait_for_function(MOVED, arg=before, timeout=30_000)
    assert box.locator(".widget-readout").first.inner_text() == "3"
