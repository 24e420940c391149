"""Every kind of page opens in Chromium (slow): nothing fails, overflows or is left undrawn, and
tables sort, at both widths and in both color schemes.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import sparsecraft as sc
from sparsecraft.evaluation.analysis.analyze import analyze
from sparsecraft.evaluation.analysis.figures import drawings
from sparsecraft.evaluation.analysis.page import page
from sparsecraft.evaluation.comparison import page as comparison
from sparsecraft.evaluation.comparison.compare import compare
from sparsecraft.evaluation.neurons import page as neurons
from sparsecraft.evaluation.neurons.neurons import analyze_neurons
from sparsecraft.evaluation.trainings import page as trainings
from sparsecraft.evaluation.trainings.series import training_series
from tests import tiny
from tests.evaluation.analysis.test_analyze import mixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = ("experts", "neurons", "training", "comparison")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kind -> the page of a tiny model."""
    folder = tmp_path_factory.mktemp("pages")
    rows, tokenizer = tiny.chat_rows(40), tiny.tokenizer()
    parts = (("a <b>", rows[:20]), ("c & d", rows[5:40]))
    files = [tiny.write_rows(folder / f"{name}.jsonl", part) for name, part in parts]
    found = analyze(mixture(), files, tokenizer=tokenizer, text="say <i> & red")
    made = {"experts": page(found, drawings(found), "The experts of a tiny mixture")}
    found = analyze_neurons(tiny.llama().eval(), files, tokenizer=tokenizer)
    neurons.write_page(found, neurons.drawings(found), folder / "neurons", "Neurons")
    model, dense = tiny.llama(), tiny.save_dense(folder / "dense")
    sc.convert(model, sc.recipes.upcycling(4, 2))
    options = {"tokenizer": tokenizer, "steps": 20, "log_every": 5, "progress": False}
    sc.train(model, files, folder / "trained", **options)
    found = training_series(folder / "trained")
    trainings.write_page(found, trainings.drawings(found), folder / "training", "Training")
    found = compare([dense, folder / "trained"], files)
    comparison.write_page(found, comparison.drawing(found), folder / "comparison")
    others = {kind: (folder / kind / "report.html").read_text() for kind in PAGES[1:]}
    return made | others


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
  let sorted = 0;
  for (const table of document.querySelectorAll("table")) {
    const values = at => [...table.tBodies[0].rows].map(row => row.cells[at].dataset.value);
    table.querySelectorAll("th button").forEach((button, at) => {
      const before = values(at).map(Number);
      const empty = values(at).includes("");  // which stay last
      if (empty || new Set(before).size < Math.max(2, before.length) || before.some(isNaN)) return;
      button.click(); const up = values(at).map(Number);
      button.click(); const down = values(at).map(Number);
      if (String(up) !== String([...up].sort((a, b) => a - b))) found.push("not sorted: " + up);
      if (String(down) !== String([...up].reverse())) found.push("not reversed: " + down);
      sorted += 1;
    });
  }
  const reading = document.getElementById("reading");
  if (reading && !reading.textContent.includes("say")) found.push("no text");
  const back = getComputedStyle(document.body).backgroundColor;
  const shown = [...document.images].map(image => image.currentSrc.slice(0, 200).length);
  const images = shown.length, width = window_;
  parent.document.title = JSON.stringify({ found, back, images, width, sorted });
}, 200));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(width, dark, kind, pages, tmp_path):
    text = pages[kind]
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
    assert found["width"] == width and found["sorted"] > 0
    assert found["back"] == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    assert "CONSOLE" not in ran.stderr
