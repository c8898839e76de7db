"""JupyterLab as a reader meets it: what `make lab` starts, driven in a headless Chromium; see `make test-browser`.

It runs on copies of the notebooks that have lost their outputs, with a store of their own; the checkout stays as it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "results" / "browser"
SECOND = 1000  # what Playwright counts in
PATIENCE = 900 * SECOND  # for a notebook that trains its models on a slow machine; it only guards against hanging
SETTINGS = {  # all cells in the page, for the screenshot; and the reader has said no to news
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false"},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# The kernel rests, and every code cell has its number or one has failed; or a dialogue waits for an answer.
ENDED = """() => {
    const {sessionContext, content} = jupyterapp.shell.currentWidget
    const cells = [...content.model.cells].filter(cell => cell.type == 'code' && cell.sharedModel.getSource().trim())
    const failed = cell => cell.outputs.toJSON().some(output => output.output_type == 'error')
    const done = cells.every(cell => cell.executionCount !== null) || cells.some(failed)
    return document.querySelector('.jp-Dialog') || sessionContext.session?.kernel?.status == 'idle' && done
}"""
LOADED = "window.jupyterapp?.shell.currentWidget?.content?.model?.cells?.length"
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
PICTURES = """[...jupyterapp.shell.currentWidget.node.querySelectorAll('.jp-OutputArea-output img')]
    .filter(image => image.complete && image.naturalWidth).length"""


def lab_command() -> list[str]:
    """What `make lab` starts, by this interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    printed = subprocess.run(["make", "-n", "-o", ".venv/.ready", "lab", "LAB=--no-browser --expose-app-in-browser"],
                             cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout  # fmt: skip
    program, command, *options = shlex.split(printed.replace("\\\n", " "))
    assert (Path(program).name, command) == ("jupyter", "lab")
    return [sys.executable, "-m", "jupyterlab", *options]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A running JupyterLab on copies of the notebooks: their folder, and the address that it prints."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    for kind, setting in SETTINGS.items():
        path = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{kind}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    places = {
        "BAGSSL_DATA": "data", "BAGSSL_RESULTS": "results", "BAGSSL_RUNS": "results/runs", "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "share", "JUPYTER_RUNTIME_DIR": "runtime",
    }  # fmt: skip
    environment = {**os.environ, **{name: str(folder / place) for name, place in places.items()}}
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(lab_command(), cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"http://127\S+", (folder / "log.txt").read_text())):
            assert server.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()
            time.sleep(0.2)
        yield folder / "notebooks", found[0]
    finally:
        server.terminate()  # its kernels end with it
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    asked = os.environ.get("CHROMIUM")
    program = next(filter(None, map(shutil.which, [asked] if asked else BROWSERS)), None)
    if program is None:
        names = asked or ", ".join(BROWSERS)
        pytest.fail(f"there is no {names}: install Chromium, or set CHROMIUM to one", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, lab):
    """A page in which anything but the server at hand is out of reach, and asking for it is a failure."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60 * SECOND)
    outside: list[str] = []
    origin = re.match(r"http://[^/]+", lab[1])[0]

    def refuse(route) -> None:
        outside.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith((origin, "data:", "blob:")), refuse)
    yield page
    page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    page.close()
    assert outside == []


def open_notebook(page, lab, name: str) -> None:
    """Open a notebook as if it were the only one ever opened, with the kernel that it names."""
    named = nbformat.read(lab[0] / name, as_version=4).metadata.kernelspec
    page.goto(re.sub(r"/tree/[^?]*\?", f"/tree/{name}?reset&", lab[1]))
    page.wait_for_function(LOADED)
    page.wait_for_function(f"{KERNEL}?.status == 'idle' || document.querySelector('.jp-Dialog')")
    assert page.locator(".jp-Dialog").all_inner_texts() == []
    assert page.evaluate("jupyterapp.shell.currentWidget.context.path") == name
    assert page.evaluate(f"{KERNEL}.name") == named.name
    shown = page.locator(".jp-Notebook-toolbar .jp-KernelName, .jp-Toolbar-kernelName").first
    assert named.display_name in shown.inner_text()


def choose(page, menu: str, entry: str) -> None:
    page.get_by_role("menubar").get_by_text(menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()


def run_all(page, lab, name: str) -> nbformat.NotebookNode:
    """Restart the kernel, run all cells, save; the notebook as it then lies on disk."""
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Restart Kernel and Run All Cells…")
    page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()
    page.locator(".jp-Dialog").wait_for(state="detached")
    page.wait_for_function(ENDED, timeout=PATIENCE, polling=SECOND)
    assert page.locator(".jp-Dialog").all_inner_texts() == []
    choose(page, "File", "Save Notebook")
    page.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty")
    return nbformat.read(lab[0] / name, as_version=4)


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def faults(executed, committed) -> list[str]:
    """What is wrong with an executed notebook beside the committed one, a line for each cell; empty when nothing is."""
    found = []
    for number, (cell, model) in enumerate(zip(executed.cells, committed.cells, strict=True)):
        if cell.cell_type != "code":
            continue
        errors = [f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"]
        if errors:
            found.append(f"cell {number}: {errors[0]}")
        elif cell.execution_count is None:
            found.append(f"cell {number}: not executed")
        elif pictures(cell) != pictures(model):
            found.append(f"cell {number}: {pictures(cell)} figures, not {pictures(model)}")
    return found


def keep_screenshot(page, name: str) -> None:
    """The whole notebook: the window grows to the height of what it holds."""
    inner = "jupyterapp.shell.currentWidget.content.node.querySelector('.jp-WindowedPanel-inner')"
    height = page.evaluate(f"{inner}.scrollHeight")
    page.set_viewport_size({"width": 1200, "height": min(height + 250, 16000)})
    page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollTo(0, 0)")
    page.wait_for_timeout(SECOND)  # for the layout to follow
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_the_lab_opens_the_tour(page, lab):
    page.goto(lab[1])
    page.wait_for_function(LOADED)
    assert page.evaluate("jupyterapp.shell.currentWidget.context.path") == "00_tour.ipynb"
    files = page.locator(".jp-DirListing-item").all_inner_texts()
    assert all(any(path.name in text for text in files) for path in PATHS)  # the others are a click away


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(page, lab, path):
    committed = nbformat.read(path, as_version=4)
    open_notebook(page, lab, path.name)
    assert page.evaluate(PICTURES) == 0  # what is seen later was drawn in this test
    executed = run_all(page, lab, path.name)
    keep_screenshot(page, path.stem)
    assert faults(executed, committed) == []
    expected = sum(pictures(cell) for cell in committed.cells if cell.cell_type == "code")
    assert expected and page.evaluate(PICTURES) == expected


@pytest.mark.parametrize("name", ["00_tour.ipynb"])  # for `make test-browser NOTEBOOK=00_tour`
def test_a_changed_parameter_changes_the_result(page, lab, name):
    committed = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    open_notebook(page, lab, name)
    page.locator(".jp-CodeCell .cm-line", has_text="ks: list[int] = [0, 1, 4, 16]").click()
    for key in ("Home", "Shift+End"):
        page.keyboard.press(key)
    page.keyboard.insert_text("ks: list[int] = [0, 1, 4, 9]")
    executed = run_all(page, lab, name)
    assert faults(executed, committed) == []
    said = [" ".join(output.get("data", {}).get("text/markdown", "") for cell in notebook.cells
                     for output in cell.get("outputs", [])) for notebook in (committed, executed)]  # fmt: skip
    assert ["a bag of 9 patches" in text for text in said] == [False, True]


def write_notebook(path: Path, *sources: str) -> nbformat.NotebookNode:
    new, metadata = nbformat.v4, nbformat.read(PATHS[0], as_version=4).metadata
    notebook = new.new_notebook(cells=[new.new_code_cell(source) for source in sources], metadata=metadata)
    nbformat.write(notebook, path)
    return notebook


def test_the_lab_shows_a_failure(page, lab):
    cells = ("import sys; print(sys.executable)", "1 / 0", "print('never reached')", "2")
    notebook = write_notebook(lab[0] / "failing.ipynb", *cells)
    open_notebook(page, lab, "failing.ipynb")
    executed = run_all(page, lab, "failing.ipynb")
    assert executed.cells[0].outputs[0].text.strip() == sys.executable  # and the kernel is this environment's
    assert faults(executed, notebook) == ["cell 1: ZeroDivisionError: division by zero", "cell 2: not executed",
                                          "cell 3: not executed"]  # fmt: skip
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", {"image/png": ""})]
    assert faults(executed, notebook)[0] == "cell 0: 0 figures, not 1"


def test_the_lab_lets_the_keys_move_the_slider(page, lab):
    write_notebook(lab[0] / "slider.ipynb", """from bagssl import data, encoders
from bagssl.study import explore, tables
train, test = (data.subset(data.load("synthetic", split), 60) for split in ("train", "test"))
explore.growing_bags(encoders.build_encoder("resnet10", 8), train, test, [0, 1], range(1, 6), scale=0.2, size=8)""")
    open_notebook(page, lab, "slider.ipynb")
    run_all(page, lab, "slider.ipynb")
    slider, shown = page.locator(".growing-bags input"), page.locator(".growing-bags output")
    slider.click()  # in its middle
    for key, k in (("ArrowRight", 4), ("ArrowRight", 5), ("Home", 1), ("ArrowUp", 2)):
        assert page.evaluate("document.activeElement.type") == "range"
        page.keyboard.press(key)
        assert shown.inner_text() == f"K = {k}"


def test_the_lab_shows_names_as_they_are(page, lab):
    """JupyterLab sets what stands between dollars, in Markdown and in HTML, as a formula."""
    write_notebook(lab[0] / "names.ipynb", """import pandas as pd
from IPython.display import Markdown, display
from bagssl.study import figures, names, tables
name = r"costs $5 or $6 \\(x\\) \\begin{align}y\\end{align} *a*"
display(tables.Table(pd.DataFrame({"choice": [name]})), Markdown(f"- {names.plain(name)}"))
Markdown("it costs $5 or $6")""")
    open_notebook(page, lab, "names.ipynb")
    run_all(page, lab, "names.ipynb")
    page.wait_for_selector("mjx-container")  # the last, which nothing escapes
    shown = [text.strip() for text in page.locator(".jp-OutputArea-output").all_inner_texts()]
    name = r"costs $5 or $6 \(x\) \begin{align}y\end{align} *a*"
    assert name in shown[0] and shown[1] == name and shown[2] != "it costs $5 or $6"
    assert page.locator("mjx-container").count() == 1


def test_the_lab_shows_training_as_one_line_and_interrupts_it(page, lab):
    write_notebook(lab[0] / "training.ipynb", """import torch
from bagssl.config import PretrainConfig
from bagssl.data import load
from bagssl.pretraining import pretrain
config = PretrainConfig(width=8, size=8, batch_size=16, views=2, epochs=1000)  # longer than anyone waits
run = pretrain(config, load("synthetic", "train").take(torch.arange(0, 4000, 50)))""")
    open_notebook(page, lab, "training.ipynb")
    choose(page, "Run", "Run All Cells")
    bar = page.locator(".jp-OutputArea-output progress")
    page.wait_for_function("document.querySelector('.jp-OutputArea-output progress')?.value > 0", timeout=PATIENCE)
    assert bar.count() == 1
    keep_screenshot(page, "training")
    choose(page, "Kernel", "Interrupt Kernel")
    page.wait_for_function(ENDED, timeout=PATIENCE, polling=SECOND)
    choose(page, "File", "Save Notebook")
    page.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty")
    keep_screenshot(page, "interrupted")
    (error,) = [output for output in nbformat.read(lab[0] / "training.ipynb", as_version=4).cells[0].outputs
                if output.output_type == "error"]  # fmt: skip
    assert re.search(r"stopped at step \d+ of 5000; the next call goes on from there$", error.evalue)
    for _ in range(2):  # now, and when it is opened again
        shown = page.locator(".jp-OutputArea-output").all_inner_texts()
        assert [text.strip() for text in shown if text.strip()] == [f"Stopped: {error.evalue}"]
        assert bar.count() == 0
        open_notebook(page, lab, "training.ipynb")


# Of each text in an output its colour against what lies behind it, as WCAG 2 has contrast: below 4.5 it is faint.
FAINT = """() => {
    const light = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
    const parts = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number)
    const luminance = ([r, g, b]) => 0.2126 * light(r / 255) + 0.7152 * light(g / 255) + 0.0722 * light(b / 255)
    const behind = node => {
        for (let at = node; at; at = at.parentElement) {
            const [r, g, b, alpha = 1] = parts(getComputedStyle(at).backgroundColor)
            if (alpha > 0.5 && r !== undefined) return [r, g, b]
        }
        return [255, 255, 255]
    }
    const texts = document.createTreeWalker(jupyterapp.shell.currentWidget.node, NodeFilter.SHOW_TEXT)
    const found = []
    while (texts.nextNode()) {
        const node = texts.currentNode.parentElement
        const shown = node.closest('.jp-OutputArea-output') && !node.closest('style, script') && node.checkVisibility()
        if (!texts.currentNode.data.trim() || !shown) continue
        const style = getComputedStyle(node)
        const front = luminance(parts(node instanceof SVGElement ? style.fill : style.color))
        const back = luminance(behind(node))
        const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05)
        found.push([contrast, texts.currentNode.data.trim().slice(0, 40)])
    }
    return {texts: found.length, faint: found.filter(([contrast]) => contrast < 4.5)}
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_what_a_notebook_shows_is_legible_in_each_theme(page, lab, theme):
    write_notebook(lab[0] / "theme.ipynb", """from pathlib import Path
from bagssl import data, encoders
from bagssl.config import PretrainConfig
from bagssl.study import claims, comparison, explore, figures, tables
figures.style()
train, test = (data.subset(data.load("synthetic", split), 60) for split in ("train", "test"))
recipe = {"width": 8, "size": 8, "batch_size": 16, "views": 2, "epochs": 3}
runs = comparison.train_all(comparison.arms(["simclr"], [0], recipe, {}), train)
runs[0]""", """measured = comparison.measure_all(runs, train, test, [0, 1, 4], scale=0.2)
tables.Table(comparison.over_seeds(measured))""", """figures.accuracy_against_k(comparison.over_seeds(measured));""",
                   """reading = comparison.gains(measured, [0, 1, 4], len(test))
claims.write_evidence(Path("out"), "C2", comparison.evidence(reading, "synthetic"))""",
                   """explore.growing_bags(encoders.build_encoder("resnet10", 8), train, test, [0], range(1, 6),
                     scale=0.2, size=8)""")  # fmt: skip
    open_notebook(page, lab, "theme.ipynb")
    executed = run_all(page, lab, "theme.ipynb")
    assert not [output for cell in executed.cells for output in cell.outputs if output.output_type == "error"]
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
    page.wait_for_function(f"document.body.dataset.jpThemeName == '{theme}'")
    keep_screenshot(page, theme.split()[1].lower())
    found = page.evaluate(FAINT)
    assert found["texts"] > 30 and found["faint"] == []
    page.evaluate("document.querySelector('.jp-OutputArea-output td').style.color = 'rgb(120, 120, 120)'")
    assert len(page.evaluate(FAINT)["faint"]) == 1  # what is faint is found
