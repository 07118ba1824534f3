"A notebook as a person runs it: JupyterLab, Run All Cells, and what is on the page then; a picture goes to runs/lab."
import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT

serverapp = pytest.importorskip("jupyter_server.serverapp", reason="make test-lab")
api = pytest.importorskip("playwright.sync_api", reason="make test-lab")

NAME = "13_colab_t4"
LIMIT = 600 # Seconds for all cells
SETTINGS = {
    "notebook-extension:tracker": dict(windowingMode="none", scrollPastEnd=False), # The page has all cells and no more
    "docmanager-extension:plugin": dict(autosave=False),
    "apputils-extension:notification": dict(fetchNews="false"),
}
IDLE = "#jp-main-statusbar :text('(ipykernel) | Idle')"
PROMPTS = ".jp-CodeCell .jp-InputPrompt" # [ ]: at first and after an error, [*]: running or waiting, [1]: done
DONE = """prompts => {
    const p = [...document.querySelectorAll(prompts)].map(x => x.innerText);
    return p[0] != '[ ]:' && !p.includes('[*]:')
}"""
HEIGHT = "x => window.innerHeight + x.scrollHeight - x.clientHeight" # Of a window that shows all of a scrolled element
UNWANTED = ["\x1b", "[0m", "Error displaying widget", "Loading widget", "IProgress not found", "Javascript Error",
            "Traceback"]


@pytest.fixture
def lab(tmp_path):
    "JupyterLab without anybody's settings: its folder, and the address of a notebook."
    names = "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"
    homes = {name: tmp_path/name for name in names}
    settings = homes["JUPYTER_CONFIG_DIR"]/"labconfig"/"default_setting_overrides.json"
    folder, log = tmp_path/"notebooks", tmp_path/"log"
    for new in (settings.parent, folder): new.mkdir(parents=True)
    settings.write_text(json.dumps({f"@jupyterlab/{name}": value for name, value in SETTINGS.items()}))
    own = {name: str(home) for name, home in homes.items()}
    env = os.environ | own | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               f"--ServerApp.root_dir={folder}"]
    with log.open("w") as said: server = subprocess.Popen(command, env=env, stdout=said, stderr=said)
    try:
        end = time.monotonic() + 120
        while not (running := list(serverapp.list_running_servers(homes["JUPYTER_RUNTIME_DIR"]))):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(.1)
        yield folder, f"{running[0]['url']}lab/tree/{NAME}.ipynb?token={running[0]['token']}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def page():
    "A page in a browser that reaches this machine only."
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None: pytest.skip("no Chromium")
    with api.sync_playwright() as p:
        page = p.chromium.launch(executable_path=browser).new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(120_000)
        page.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
        yield page


def read(path):
    "A notebook, its code cells, and the kinds of what each of them displays."
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if c.source.strip()]
    code = [c for c in nb.cells if c.cell_type == "code"]
    return nb, code, [[sorted(o.data) for o in c.outputs if "data" in o] for c in code]


@pytest.mark.slow
def test_run_all_cells(lab, page):
    folder, address = lab
    nb, code, displayed = read(ROOT/"nbs"/f"{NAME}.ipynb")
    for c in code: c.update(outputs=[], execution_count=None)
    nbformat.write(nb, folder/f"{NAME}.ipynb")

    page.goto(address)
    page.wait_for_selector(IDLE)
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    try: page.wait_for_function(DONE, arg=PROMPTS, timeout=LIMIT * 1000)
    except api.TimeoutError:
        waiting = page.locator(".jp-CodeCell", has_text="[*]:").all_inner_texts()
        pytest.fail("\n".join([f"After {LIMIT} s this was not done:", *waiting[:1]]))
    page.wait_for_selector(IDLE)
    def is_saved(response): return response.request.method == "PUT" and "/api/contents/" in response.url
    with page.expect_response(is_saved): page.keyboard.press("Control+s")
    page.set_viewport_size(dict(width=1400, height=page.locator(".jp-WindowedPanel-outer").evaluate(HEIGHT)))
    page.screenshot(path=ROOT/"runs"/"lab"/f"{NAME}.png")

    _, code, now_displayed = read(folder/f"{NAME}.ipynb")
    outputs = [o for c in code for o in c.outputs]
    assert [f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"] == []
    assert [c.source for c in code if c.execution_count is None] == []
    assert [now for now, saved in zip(now_displayed, displayed) if saved] == [saved for saved in displayed if saved]

    data = [o.data for o in outputs if "data" in o]
    for tag in ("img", "table", "progress", "iframe"):
        html = sum(d["text/html"].count(f"<{tag}") for d in data if "text/html" in d)
        saved = html + sum(tag == "img" and "image/png" in d for d in data if "text/html" not in d)
        assert page.locator(f".jp-OutputArea-output {tag}").count() == saved, tag
    assert all(page.locator(".jp-OutputArea-output img").evaluate_all("found => found.map(x => x.naturalWidth)"))
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(nb.cells) and page.locator(".jp-Dialog").count() == 0
    api.expect(page.locator(".jp-Notebook .jp-Cell").last).to_be_in_viewport()
    said = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())
    assert [text for text in UNWANTED if text in said] == []
