"""The page opens without a network and says what the numbers say; in Chromium (slow) nothing fails,
overflows or is left undrawn, at both widths and in both color schemes.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from sparsecraft.evaluation.analysis.analyze import analyze
from sparsecraft.evaluation.analysis.figures import FIGURES, drawings
from sparsecraft.evaluation.analysis.page import page, write_page
from tests import tiny
from tests.evaluation.analysis.test_analyze import mixture, of_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = tiny.chat_rows(40)
    files = [
        tiny.write_rows(folder / f"{name}.jsonl", part)
        for name, part in (("a <b>", rows[:20]), ("c & d", rows[5:40]))
    ]
    return analyze(mixture(), files, tokenizer=tiny.tokenizer(), text="say <i> & red")


def test_files_and_what_they_hold(metrics, tmp_path):
    (tmp_path / "mine.txt").write_text("stays")
    written = write_page(metrics, drawings(metrics), tmp_path, "A title")
    assert {"report.html", "metrics.json", "load.png", "knowledge.png"} <= set(written)
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert json.loads((tmp_path / "metrics.json").read_text())["tokens"] == metrics["tokens"]
    text = (tmp_path / "report.html").read_text()
    pngs = [name for name in written if name.endswith(".png")]
    assert text.count("<img ") == len(pngs) == len(drawings(metrics))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pngs)


def test_it_needs_nothing_from_elsewhere_and_escapes_what_is_given(metrics):
    text = page(metrics, drawings(metrics), "<script>alert(1)</script>")
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert "<script>alert" not in text and "a &lt;b&gt;" in text
    assert "say <i>" not in text


def test_figures_say_the_numbers(metrics):
    drawn = {drawing.name: drawing for drawing in drawings(metrics)}
    loads = [
        share * layer["experts"] for layer in metrics["layers"].values() for share in layer["load"]
    ]
    assert f"{min(loads):.2f} to {max(loads):.2f}" in drawn["load"].says
    assert len(FIGURES) >= len(drawn) >= 7
    assert all(drawing.title and drawing.says.endswith(".") for drawing in drawn.values())


@pytest.mark.parametrize("change", ["one domain", "interrupted", "nothing but loads"])
def test_less_to_say(change, metrics, tmp_path):
    """A page for what little there is."""
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(3))
    found = analyze(of_rows(), rows, tokenizer=tiny.tokenizer(), twin=False, drop=False)
    if change == "nothing but loads":
        kept = {"experts", "load", "load_by_domain", "load_entropy", "dead", "overloaded"}
        found["layers"] = {
            name: {key: value for key, value in layer.items() if key in kept}
            for name, layer in found["layers"].items()
        }
        found |= {"following": [], "paths": None}
    written = write_page(found, drawings(found), tmp_path / "out", "little")
    assert "load.png" in written and "knowledge.png" not in written


CHECKS = """
<script>
window.found = [];
window.onerror = (text) => found.push("error: " + text);
window.addEventListener("load", () => setTimeout(() => {
  const wide = document.documentElement.scrollWidth, window_ = document.documentElement.clientWidth;
  if (wide > window_) found.push(`overflow: ${wide} of ${window_}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth || image.clientWidth > window_)
      found.push("image: " + image.alt);
  const table = [...document.querySelectorAll("table")].find(t => t.tBodies[0].rows.length > 1);
  const numbers = () => [...table.tBodies[0].rows].map(row => Number(row.cells[1].dataset.value));
  const button = table.querySelectorAll("th button")[1];
  button.click(); const up = numbers(); button.click(); const down = numbers();
  if (String(up) !== String([...up].sort((a, b) => a - b))) found.push("not sorted: " + up);
  if (String(down) !== String([...up].reverse())) found.push("not reversed: " + down);
  const reading = document.getElementById("reading");
  if (reading && !reading.textContent.includes("say")) found.push("no text");
  const back = getComputedStyle(document.body).backgroundColor;
  const shown = [...document.images].map(image => image.currentSrc.slice(0, 200).length);
  parent.document.title = JSON.stringify({ found, back, images: shown.length, width: window_ });
}, 200));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(width, dark, metrics, tmp_path):
    text = page(metrics, drawings(metrics), "The experts of a tiny mixture")
    framed = html.escape(text.replace("<head>", "<head>" + CHECKS, 1))
    style = f"border: 0; width: {width}px; height: 1000px"
    path = tmp_path / "framed.html"  # a window of its own is 500 wide at least
    path.write_text(f'<title></title><iframe style="{style}" srcdoc="{framed}"></iframe>')
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--hide-scrollbars", "--virtual-time-budget=5000", "--window-size=1500,2000", *scheme,
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", ran.stdout).group(1)
    found = json.loads(html.unescape(title))
    assert found["found"] == [] and found["images"] == text.count("<img ")
    assert found["width"] == width
    assert found["back"] == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    assert "CONSOLE" not in ran.stderr
