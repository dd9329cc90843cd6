"""The page in a browser: at a phone's width and a desk's, light and dark, nothing sticks out to the side.

Needs Chromium or Chrome (`chromium`, `chromium-browser`, `google-chrome` or `chrome` on the path, or CHROMIUM=PATH).
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from report.fakes import bench, bench_row, body, gathered, layer, looked, naive, search_result, written
from sparseport.report.bench_file import read_bench
from sparseport.report.naive_file import read_naive
from sparseport.report.page import page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# What the page itself forbids: a script, which opens everything and then measures.
_SCRIPT = """<script>
for (const one of document.querySelectorAll("details")) one.open = true;
const wide = document.documentElement.clientWidth;
const inside = one => { for (let up = one.parentElement; up; up = up.parentElement)
  if (getComputedStyle(up).overflowX !== "visible") return true; return false; };
const out = [...document.querySelectorAll("main *")].filter(one =>
  one.getBoundingClientRect().right > wide + 1 && !inside(one) && !one.closest("svg"));
const shown = name => [...document.querySelectorAll(name)].filter(one => one.getBoundingClientRect().width > 0).length;
const found = JSON.stringify({
  width: wide, scroll: document.documentElement.scrollWidth,
  out: out.slice(0, 5).map(one => one.outerHTML.slice(0, 120)),
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  upright: shown(".upright"), lying: shown(".lying"),
  front: document.querySelector(".front").getBoundingClientRect().width,
});
parent.document.body.textContent = found;
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(_NAMES)}, and CHROMIUM is not set")
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything on it: 40 blocks, long names without a place to break, and a bar beyond all others."""
    tmp_path = tmp_path_factory.mktemp("browser")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    linears = {f"model.layers.{n}.{part}": layer((16, 16), pruned=n * 6) for n in range(40) for part in parts}
    folder = looked(tmp_path / "a", body(linears=linears), name="x" * 60)
    rows = [bench_row("y" * 70, folder.seal), bench_row("other", engine="an-engine-with-a-very-long-name-of-its-own")]
    compared = naive()
    compared["rows"][1]["path"] = "z" * 70
    data = gathered(
        folder,
        looked(tmp_path / "b", body("onnx", linears=None), name="other"),
        benches=(read_bench(written(tmp_path / "b.json", bench(*rows))),),
        naive=read_naive(written(tmp_path / "n.json", compared)),
        search=("search.json", search_result()),
    )
    text, forbidden = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(data))
    assert forbidden == 1
    return text.replace("</body>", f"{_SCRIPT}</body>")


def _seen(chromium: str, text: str, width: int, dark: bool, folder: Path) -> dict[str, Any]:
    """What the script finds in a frame of that width: a window without a screen may not be narrower than 500."""
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    schemes = '<meta name="color-scheme" content="light dark">'
    (folder / "frame.html").write_text(f"<!doctype html>{schemes}<body>{frame}</body>", encoding="utf-8")
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--no-first-run"]
    command += [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r"<body>\s*(\{.*\})\s*</body>", done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


def _brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, False), (1280, True)])
def test_nothing_sticks_out(chromium: str, measured: str, tmp_path: Path, width: int, dark: bool) -> None:
    found = _seen(chromium, measured, width, dark, tmp_path)
    assert found["width"] == width and found["dark"] is dark
    assert (found["out"], found["scroll"] <= width) == ([], True)
    assert (_brightness(found["paper"]) < _brightness(found["ink"])) is dark
    assert (found["upright"] > 0) is (width < 900) and (found["lying"] > 0) is (width >= 900)
    assert 0.6 * width < found["front"] <= width
