"The report's page in a browser: one run and three, wide and narrow, light and dark."
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import ATTACK, leave

from rlhf_nb.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
POLICY = re.compile(r"<meta http-equiv[^>]*>")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")


def opened(page: Path, dark: bool = False) -> tuple[str, str]:
    "What the page is after it was opened, and the browser's log."
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={page.parent/'profile'}",
             f"--blink-settings=preferredColorScheme={int(not dark)}", "--dump-dom"]
    run = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def title(dom: str) -> str: return html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1])


MEASURE = """<script>
const style = e => getComputedStyle(e), pictures = [...document.querySelectorAll("figure svg")];
document.querySelectorAll("details").forEach(e => e.open = true);
parent.document.title = JSON.stringify({width: innerWidth, room: document.documentElement.clientWidth,
                                        needed: document.documentElement.scrollWidth,
  sizes: pictures.map(e => e.getBoundingClientRect().width),
  letters: Math.min(...[...document.querySelectorAll("figure svg text")].map(e => e.getBoundingClientRect().height)),
  back: style(document.body).backgroundColor, ink: style(document.body).color,
  text: style(pictures[0].querySelector("text")).fill,
  loaded: performance.getEntriesByType("resource").map(e => e.name)});
</script>"""


def measured(page: Path, width: int = 1300, dark: bool = False) -> dict:
    "Sizes and colours, in a frame of this width; the copy that is measured may run a script."
    text = page.read_text(encoding="utf-8")
    assert POLICY.search(text)
    copy = html.escape(POLICY.sub("", text).replace("</body>", f"{MEASURE}</body>"))
    frame = page.with_name("frame.html")
    frame.write_text("<!doctype html><meta charset=utf-8><title></title>"
                     f"<iframe style='width: {width}px; border: 0' srcdoc=\"{copy}\"></iframe>", encoding="utf-8")
    return json.loads(title(opened(frame, dark)[0]))


@pytest.fixture(scope="module", params=[1, 3], ids=["one run", "three runs"])
def page(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report([leave(folder/f"run{'-with-a-long-name' * i}", i) for i in range(request.param)],
                        folder/"report.html")


def test_opens_without_errors_and_changes_nothing(page):
    dom, log = opened(page)
    written = page.read_text(encoding="utf-8")
    assert "CONSOLE" not in log and title(dom) == title(written)
    for tag in ("svg", "table", "tr", "ins", "del", "section"):
        assert dom.count(f"<{tag}") == written.count(f"<{tag}") > 0
    assert not re.search(r"https?://(?!example\.com)", written)


def test_a_script_that_got_in_would_not_run(page, tmp_path):
    copy = tmp_path/"injected.html"
    attacked = page.read_text(encoding="utf-8").replace("</body>", f"{ATTACK}<img src='https://example.com/a.png'></body>")
    copy.write_text(attacked, encoding="utf-8")
    dom, log = opened(copy)
    assert title(dom) == title(copy.read_text(encoding="utf-8")) and "CONSOLE" in log
    assert "Content Security Policy" in log


@pytest.mark.parametrize("width, dark", [(1300, False), (400, True)])
def test_fits_and_can_be_read(page, width, dark):
    seen, bright = measured(page, width, dark), lambda color: sum(map(int, re.findall(r"\d+", color)[:3])) / 765
    assert seen["width"] == width and seen["needed"] <= seen["room"]
    assert len(seen["sizes"]) > 14 and min(seen["sizes"]) > 200 and seen["letters"] > 9
    assert (bright(seen["back"]) < .2 and bright(seen["ink"]) > .8) if dark else (bright(seen["back"]) > .9
                                                                                  and bright(seen["ink"]) < .2)
    assert seen["text"] == seen["ink"] and seen["loaded"] == []


def test_a_hundred_updates_are_a_small_file(tmp_path):
    assert write_report([leave(tmp_path/"run", 0)], tmp_path/"report.html").stat().st_size < 500_000
    assert write_report([leave(tmp_path/"long", 0, 5000)], tmp_path/"long.html").stat().st_size < 1_000_000
