"""Whatever stands in a file or in a folder's name is text of the page, never markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.fakes import CONFIG, bench, bench_row, body, gathered, layer, looked, naive, search_result, written
from report.html_checks import checked
from sparseport.report.bench_file import read_bench
from sparseport.report.html import Markup, escaped, join, leaf, table, tag
from sparseport.report.naive_file import read_naive
from sparseport.report.page import page

EVIL = "<script>alert(1)</script><img src=https://x.invalid/y onerror=z>\"'&<!--"
SHOWN = "&lt;script&gt;alert(1)&lt;/script&gt;"


def everything_hostile(tmp_path: Path) -> str:
    """A page with hostile text in every place that a file or a name can reach."""
    data = body(
        linears={f"model.layers.0.{EVIL}": layer((8, 8), rule=EVIL, stored=f"u4 {EVIL}")},
        sparseport=EVIL,
        recipe={EVIL: EVIL, "sub_adapter": [EVIL, {EVIL: EVIL}]},
        inputs={EVIL: {EVIL: EVIL}},
        origin={"base_model": {"name": f"owner/{EVIL}", "source": EVIL}},
        versions={EVIL: EVIL},
        files={f"{EVIL[:8]}x.bin": {"sha256": EVIL, "size": 3}},
    )
    data["tensors"][EVIL] = {**data["tensors"]["model.embed_tokens.weight"], "stored": EVIL}
    data["numerics"][f"with {EVIL}"] = {
        "judged_max_abs": "1e-3",
        "allowed": "1e-3",
        "judged_against": EVIL,
        "settings": {EVIL: EVIL},
    }
    data["files"][f"adapter{EVIL[:8]}"] = {"sha256": EVIL, "size": 3}
    branch = {"rank": 1, "branch_sha256": EVIL, "readback": {"openvino": EVIL}}
    data["adapters"] = {f"adapter{EVIL[:8]}": {EVIL: branch}}
    config = {**CONFIG, "model_type": EVIL, "architectures": [EVIL]}
    folder = looked(tmp_path / "a", data, config, name=EVIL, differences=(EVIL,))
    row = bench_row(EVIL, folder.seal, model=EVIL, engine=EVIL, device=EVIL, settings={EVIL: EVIL})
    more: dict[str, Any] = {
        "devices": [
            {"name": EVIL, "present": True, "full_name": EVIL},
            {"name": f"2{EVIL}", "present": False, "why": EVIL},
        ],
        "missing": [{"engine": EVIL, "why": EVIL, "fix": EVIL}],
        "failed": [{"label": EVIL, "engine": EVIL, "why": EVIL}],
    }
    content = bench(row, **more)
    content["machine"] |= {"processor": EVIL, "flags": [EVIL], "system": EVIL, "python": EVIL, "versions": {EVIL: EVIL}}
    content["asked"][EVIL] = EVIL
    compared = naive()
    compared["rows"][1]["path"] = EVIL
    compared["machine"] |= {"cpu": EVIL, "versions": {EVIL: EVIL}}
    result = search_result(strategy={"name": EVIL}, reason=EVIL, space=EVIL, evaluation=EVIL, journal_sha256=EVIL)
    return page(
        gathered(
            folder,
            between=(EVIL,),
            benches=(read_bench(written(tmp_path / "b.json", content)),),
            naive=read_naive(written(tmp_path / "n.json", compared)),
            search=(EVIL, result),
        )
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """The page has no tag, attribute, comment or address that its texts asked for, and shows them."""
    text = everything_hostile(tmp_path)
    checked(text)
    assert text.count(SHOWN) > 60
    head, _, rest = text.partition("</style>")
    assert "<script" not in text and "<img" not in text and "<!--" not in rest and head.count("<!--") == 1


@pytest.mark.parametrize("name", ["\u202egnp.exe", "a\u2028b", "tab\there", "nul\0", "bell\x07"])
def test_characters_that_hide_or_turn_text_are_shown(tmp_path: Path, name: str) -> None:
    text = page(gathered(looked(tmp_path / "a", name=name)))
    checked(text)
    assert name not in text and ("\\u" in text or "\\x" in text or "\\t" in text)


@given(st.text(), st.text())
def test_any_text_comes_back(content: str, value: str) -> None:
    """A parser reads exactly what was put in, in content and in attributes, but for unprintable characters."""
    parser = checked(tag("p", content, title=value))
    seen = "".join(parser.pieces)
    shown = [value for _, name, value in parser.attributes if name == "title"]
    for found, given_ in ((seen, content), (shown[0], value)):
        expected = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in given_)
        assert found == expected


def test_markup_is_not_escaped_twice_and_text_always_is() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, " & ", None) == "<p><b>1 &lt; 2</b> &amp; </p>"
    assert isinstance(inner, Markup) and escaped(inner) is inner
    # Putting markup into a text makes text of it, which is the safe side to be wrong on.
    assert escaped(f"{inner}") == "&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;"
    assert leaf("meta", http_equiv="a", class_="b", c=None) == '<meta http-equiv="a" class="b"/>'
    assert join(["<", Markup("<br/>")]) == "&lt;<br/>"
    assert "<td>&lt;i&gt;</td>" in table(["<h>"], [["<r>", "<i>"]], "<c>")
