"""Where tensors lie: maps of IRs, ONNX models and safetensors, of damaged ones too, and files cut into parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.transit.layout import Elements, Part, Points, Region
from sparseport.transit.protobuf import fields, varint
from sparseport.transit.regions import map_folder, parts_of

# Codes [2, 2, 4] with a zero-point for each group, codes [3, 2] with one per row, a table of text, a vector.
CONSTANTS = {
    0: ("u4", "2, 2, 4", 0, 8),
    2: ("u4", "2, 2, 1", 8, 2),
    5: ("u8", "3, 2", 10, 6),
    7: ("u8", "3, 1", 16, 3),
    9: ("u8", "5", 19, 5),
    10: ("f16", "4", 24, 8),
}
KINDS = {1: "Convert", 3: "Convert", 4: "Subtract", 6: "Convert", 8: "Subtract"}
EDGES = ((0, 0, 1, 0), (1, 1, 4, 0), (2, 0, 3, 0), (3, 1, 4, 1), (5, 0, 6, 0), (6, 1, 8, 0), (7, 0, 8, 1))


def const(number: int, kind: str, shape: str, offset: int, size: int) -> str:
    data = f'<data element_type="{kind}" shape="{shape}" offset="{offset}" size="{size}"/>'
    return f'<layer id="{number}" name="c{number}" type="Const">{data}</layer>'


IR = (
    '<?xml version="1.0"?><net name="m" version="11"><layers>'
    + "".join(const(number, *facts) for number, facts in CONSTANTS.items())
    + "".join(f'<layer id="{number}" name="o{number}" type="{kind}"/>' for number, kind in KINDS.items())
    + f'<layer id="11" name="if" type="If"><body><layers>{const(0, "f32", "2", 0, 8)}</layers></body></layer>'
    + "</layers><edges>"
    + "".join('<edge from-layer="{}" from-port="{}" to-layer="{}" to-port="{}"/>'.format(*edge) for edge in EDGES)
    + "</edges></net>"
)
NO_IR = ("", "<net>", "junk", IR.replace('id="3"', ""), IR.replace('offset="8"', 'offset="x"'))


def ir(tmp_path: Path, text: str, size: int = 32) -> list[Region]:
    (tmp_path / "m.xml").write_text(text)
    (tmp_path / "m.bin").write_bytes(bytes(size))
    return map_folder(tmp_path, ["m.xml", "m.bin"])["m.bin"]


def test_constants_of_an_ir(tmp_path):
    """Text stays bytes, the body of an If is not the graph, and zero-points are found through the graph's edges."""
    assert ir(tmp_path, IR) == [
        Region(0, 8, Elements(4, 8, points=Points(8, 4, 2, 1, 4))),
        Region(8, 2, Elements(4, 2)),
        Region(10, 6, Elements(8, 2, points=Points(16, 3, 1, 1, 2))),
        Region(24, 8, Elements(16, 1)),
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('shape="2, 2, 1" offset="8" size="2"', 'shape="2, 2, 1" offset="31" size="2"'),  # end of the file
        ('shape="2, 2, 1" offset="8"', 'shape="2, 2, 1" offset="6"'),  # inside the codes themselves
        ('shape="2, 2, 1"', 'shape="2, 1, 2"'),  # shared along an axis in the middle
        ('element_type="u4" shape="2, 2, 1"', 'element_type="u8" shape="2, 2, 1"'),
    ],
)
def test_zero_points_that_cannot_be_are_not_used(tmp_path, old, new):
    assert old in IR
    assert ir(tmp_path, IR.replace(old, new))[0] == Region(0, 8, Elements(4, 8))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('offset="0" size="8"/>', 'offset="25" size="8"/>'),
        ('offset="0" size="8"/>', 'offset="-1" size="8"/>'),
        ('shape="2, 2, 4" offset="0" size="8"', 'shape="2, 3, 5" offset="0" size="8"'),
        ('shape="2, 2, 4" offset="0" size="8"', 'shape="2, 0, 4" offset="0" size="0"'),
        ('shape="2, 2, 4" offset="0" size="8"', f'shape="2, {1 << 40}" offset="0" size="8"'),
    ],
)
def test_a_constant_that_does_not_fit_the_file_is_left_out(tmp_path, old, new):
    found = ir(tmp_path, IR.replace(old, new, 1))
    assert found and all(region.offset != 0 and region.end <= 32 for region in found)


@pytest.mark.parametrize(
    "text", ["", "<net>", "junk", IR.replace('id="3"', ""), IR.replace('offset="8"', 'offset="x"')]
)
def test_what_is_no_ir_has_no_map(tmp_path, text):
    assert ir(tmp_path, text) == []


def onnx_model(folder: Path) -> None:
    """MatMulNBits with three groups per row and with none, DequantizeLinear in blocks and by axis, an inline tensor."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    tensors, data = [], b""
    for name, kind, shape, size in (
        ("nbits", kinds.UINT8, [4, 3, 8], 96),
        ("nbits.zero", kinds.UINT8, [4, 2], 8),
        ("middle", kinds.UINT8, [2, 1, 8], 16),
        ("blocked", kinds.UINT4, [8, 6], 24),
        ("blocked.zero", kinds.UINT4, [2, 6], 6),
        ("rows", kinds.INT8, [4, 5], 20),
        ("rows.zero", kinds.INT8, [4], 4),
        ("text", kinds.UINT8, [7], 7),
        ("table", kinds.FLOAT16, [3, 4], 24),
    ):
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=kind, data_location=kinds.EXTERNAL)
        for key, value in (("location", "w.data"), ("offset", len(data)), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        data += bytes(size)
    tensors.append(onnx.numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "inline"))
    nbits = {"domain": "com.microsoft", "bits": 4, "block_size": 16}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "nbits", "s", "nbits.zero"], ["y1"], K=48, N=4, **nbits),
        helper.make_node("MatMulNBits", ["x", "middle", "s"], ["y2"], K=16, N=2, **nbits),
        helper.make_node("DequantizeLinear", ["blocked", "s", "blocked.zero"], ["y3"], axis=0, block_size=4),
        helper.make_node("DequantizeLinear", ["rows", "s", "rows.zero"], ["y4"], axis=0),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], initializer=tensors))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    (folder / "w.data").write_bytes(data)


def test_constants_of_an_onnx_model(tmp_path):
    onnx_model(tmp_path)
    found = map_folder(tmp_path, ["m.onnx", "w.data"])
    assert found["w.data"] == [
        Region(0, 96, Elements(4, 48, points=Points(96, 16, 4, 1, 16))),
        Region(104, 16, Elements(4, 16, centre=8)),
        Region(120, 24, Elements(4, 6, points=Points(144, 12, 6, 4, 1))),
        Region(144, 6, Elements(4, 6)),
        Region(150, 20, Elements(8, 5, points=Points(170, 4, 1, 1, 5))),
        Region(170, 4, Elements(8, 1)),
        Region(181, 24, Elements(16, 4)),
    ]
    (inline,) = found["m.onnx"]
    values = (tmp_path / "m.onnx").read_bytes()[inline.offset : inline.end]
    assert inline.elements == Elements(32, 4) and values == np.arange(12, dtype="<f4").tobytes()


@pytest.mark.parametrize("cut", range(0, 400, 13))
def test_a_damaged_onnx_model_has_no_map_or_one_inside_its_files(tmp_path, cut):
    onnx_model(tmp_path)
    path = tmp_path / "m.onnx"
    data = bytearray(path.read_bytes())
    for damaged in (bytes(data[:cut]), bytes(data[:cut]) + b"\xff" + bytes(data[cut + 1 :])):
        path.write_bytes(damaged)
        for name, regions in map_folder(tmp_path, ["m.onnx", "w.data"]).items():
            assert all(0 <= region.offset < region.end <= (tmp_path / name).stat().st_size for region in regions)


def test_external_data_elsewhere_is_not_looked_at(tmp_path):
    onnx_model(tmp_path)
    path = tmp_path / "m.onnx"
    path.write_bytes(path.read_bytes().replace(b"w.data", b"../../"))
    assert "w.data" not in map_folder(tmp_path, ["m.onnx", "w.data"])


def test_tensors_of_safetensors(tmp_path):
    from sparseport.checkpoints.safetensors import spec_of, write_safetensors

    arrays = {"a": np.zeros((3, 4), np.float16), "b": np.zeros(6, np.int64), "c": np.ones((2, 2, 2), np.float32)}
    write_safetensors(tmp_path / "m.safetensors", [spec_of(name, array) for name, array in arrays.items()])
    found = map_folder(tmp_path, ["m.safetensors"])["m.safetensors"]
    assert sorted((region.size, region.elements) for region in found) == [(24, Elements(16, 4)), (32, Elements(32, 4))]
    data = (tmp_path / "m.safetensors").read_bytes()
    assert any(data[region.offset : region.end] == arrays["c"].tobytes() for region in found)
    (tmp_path / "m.safetensors").write_bytes(data[:-1])
    assert map_folder(tmp_path, ["m.safetensors"])["m.safetensors"] == []


@given(st.data())
def test_parts_cover_a_file_once_and_zero_points_come_first(data):
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 7, 64, 70_000]), max_size=12))
    regions, position = [], 0
    for number, size in enumerate(sizes):
        if size and number % 2:
            elements = Elements(data.draw(st.sampled_from([4, 8])), 2 if size % 2 == 0 else 1)
            elements = replace(elements, bits=8) if size % 2 else elements
            regions.append(Region(position, size, elements))
        position += size
    bare = list(regions)
    for i, region in enumerate(regions):
        if bare and data.draw(st.booleans()):
            other = data.draw(st.sampled_from(bare))
            elements = replace(region.elements, points=Points(other.offset, 1, 1, 1 << 20, 1 << 20))
            regions[i] = replace(region, elements=elements)
    coded = {region.offset for region in regions if region.elements.points}
    parts = parts_of(regions, position)
    covered = sorted(extent for part in parts for extent in part.extents)
    assert [first for first, _ in covered] == [sum(size for _, size in covered[:i]) for i in range(len(covered))]
    assert sum(size for _, size in covered) == position
    done: set[int] = set()
    for part in parts:
        if part.elements and part.elements.points and part.elements.points.offset not in coded:
            assert part.elements.points.offset in done
        done |= {first for first, _ in part.extents}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_stretches_of_a_part(sizes, data):
    """`within` against a list of every byte's place."""
    extents = tuple((100 * number, size) for number, size in enumerate(sizes))
    places = [first + i for first, size in extents for i in range(size)]
    first = data.draw(st.integers(0, len(places)))
    size = data.draw(st.integers(0, len(places) - first))
    found = list(Part(extents).within(first, size))
    assert [begin + i for begin, length in found for i in range(length)] == places[first : first + size]


def test_numbers_of_protobuf():
    assert varint(memoryview(b"\xac\x02"), 0, 2) == (300, 2)
    message = memoryview(b"\x08\xac\x02\x12\x02hi\x1d1234\x2112345678")
    assert [(one.number, one.value, one.begin, one.end) for one in fields(message, 0, len(message))] == [
        (1, 300, 1, 3),
        (2, 0, 5, 7),
        (3, 0, 8, 12),
        (4, 0, 13, 21),
    ]
    for wrong in (b"\x08", b"\x08\xff" * 6, b"\x12\x05hi", b"\x0b", b"\x08" + b"\xff" * 11, b"\x1d123"):
        with pytest.raises(ValueError):
            list(fields(memoryview(wrong), 0, len(wrong)))
