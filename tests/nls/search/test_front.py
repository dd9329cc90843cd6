"""The result file reads back strictly; the picture is the same bytes for the same result."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy import OBJECTIVE_PAIR, SIZES, evaluation_of, everything

from sparseport.errors import BadInput, UsageError
from sparseport.nls.search.candidates import named_candidates
from sparseport.nls.search.front import SearchResult, front_of, read_result, write_result
from sparseport.nls.search.objectives import Evaluation
from sparseport.nls.search.plot import draw

THIRD = tuple(everything()[::3])


def made(candidates=THIRD, objectives=OBJECTIVE_PAIR):
    marks = named_candidates(SIZES)
    evaluations = tuple(
        Evaluation(c, {o.name: evaluation_of(c).values[o.name] for o in objectives}, 0.25)
        for c in dict.fromkeys([*marks.values(), *candidates])
    )
    front = front_of(evaluations, objectives)
    return SearchResult(
        strategy={"name": "nsga2", "seed": 0, "seeds": {}},
        space="a" * 64,
        evaluation="b" * 64,
        objectives=objectives,
        evaluations=evaluations,
        front=front,
        seeds=marks,
        chosen=front[0],
        reason="the highest accuracy",
        journal_sha256="c" * 64,
        seconds=0.25 * len(evaluations),
    )


RESULT = made()


def written(folder: Path, result=RESULT):
    path = folder / "search.json"
    write_result(path, result)
    return path


@pytest.mark.parametrize("result", [RESULT, dataclasses.replace(RESULT, chosen=None), made(())])
def test_a_result_reads_back(tmp_path, result):
    path = written(tmp_path, result)
    found = read_result(path)
    assert found == result and [e.seconds for e in found.evaluations] == [0.25] * len(result.evaluations)
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]
    assert written(tmp_path, found).read_bytes() == path.read_bytes()


def test_an_unfinished_write_leaves_the_old_file(tmp_path):
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_result(path, dataclasses.replace(RESULT, seconds=float("nan")))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["search.json"]


def at(*path, value):
    """A change of one place of the file."""

    def change(data):
        node = data
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("sparseport_search_result", value=0),
        at("sparseport_search_result", value=True),
        at("more", value=1),
        lambda data: data.pop("reason"),
        at("front", 0, value=[16, 16, 16, 0]),
        lambda data: data["front"].pop(),
        lambda data: data["front"].reverse(),
        at("front", value={}),
        at("chosen", value=[1, 2, 3, 4]),
        at("chosen", value="maximal"),
        at("seeds", "maximal", value=[32, 32, 64]),
        at("evaluations", 0, "values", "accuracy", value=0.99),
        at("evaluations", 0, "values", "accuracy", value="0.99"),
        at("evaluations", 0, "values", value=[]),
        at("evaluations", 0, "seconds", value=-1),
        at("evaluations", 0, "sizes", value=[32.0, 32, 64, 1]),
        at("evaluations", 0, "sizes", value=[]),
        lambda data: data["evaluations"].append(data["evaluations"][0]),
        lambda data: data["evaluations"].append({**data["evaluations"][0], "sizes": [1]}),
        at("evaluations", value=[]),
        at("objectives", 0, "direction", value="up"),
        at("objectives", 0, "name", value=1),
        at("objectives", value=[]),
        at("seconds", value="1"),
        at("strategy", value=None),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(tmp_path, change):
    path = written(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BadInput) as raised:
        read_result(path)
    assert raised.value.code == "E_RESULT" and raised.value.where == str(path)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('result": 1', 'result": 2'), encoding="utf-8")
    with pytest.raises(Exception, match="upgrade sparseport"):
        read_result(path)


def test_the_picture_shows_everything_and_tells_nothing_of_where_it_was_made(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    svg, png = tmp_path / "front.svg", tmp_path / "front.png"
    draw(RESULT, [svg, png])
    text = svg.read_text(encoding="utf-8")
    for label in (
        "minimal",
        "heuristic",
        "maximal",
        "Pareto front",
        "accuracy of the heuristic",
        "chosen",
        "evaluated",
    ):
        assert f"<!-- {label} -->" in text
    # What the front's line and the faint points lie on, counted in the SVG itself.
    assert len(re.findall(r"<use [^>]*fill-opacity: 0.3", text)) >= len(RESULT.evaluations)
    assert re.search(r"stroke-dasharray", text)
    for trace in (str(tmp_path), "dc:date", "20" + "26-"):
        assert trace not in text and trace.encode() not in png.read_bytes()
    pixels = image.imread(png)
    assert pixels.shape[0] > 500 and pixels[0, 0, :3].tolist() == [1.0, 1.0, 1.0]


def test_the_same_result_gives_the_same_bytes_in_any_process(tmp_path):
    pytest.importorskip("matplotlib")
    result = written(tmp_path)
    code = """
import sys
from pathlib import Path
import matplotlib
matplotlib.rcParams["axes.linewidth"] = 9  # a user's own style
from sparseport.nls.search.front import read_result
from sparseport.nls.search.plot import draw
draw(read_result(Path(sys.argv[1])), [Path(sys.argv[2]), Path(sys.argv[3])])
assert matplotlib.rcParams["axes.linewidth"] == 9
"""
    draw(RESULT, [tmp_path / "a.svg", tmp_path / "a.png"])
    command = [sys.executable, "-c", code, str(result), str(tmp_path / "b.svg"), str(tmp_path / "b.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_picture_needs_a_cost_and_a_known_kind_of_file(tmp_path):
    with pytest.raises(UsageError, match="the accuracy and a cost"):
        draw(made(objectives=OBJECTIVE_PAIR[:1]), [tmp_path / "a.svg"])
    with pytest.raises(UsageError, match="expected macs, found latency"):
        draw(RESULT, [tmp_path / "a.svg"], cost="latency")
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        draw(RESULT, [tmp_path / "a.pdf"])
    assert list(tmp_path.iterdir()) == []
