"""`sparseport verify` finds any changed bit, and names the file and the tensor."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseport.cli import main
from sparseport.errors import SparseportError, VerificationError
from sparseport.targets.openvino import readback
from sparseport.verify.folder import verify


@pytest.fixture
def copy(tiny_qa: Any, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(tiny_qa[1].folder, target)
    return target


def _flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def _differences(folder: Path) -> list[str]:
    try:
        return verify(folder).differences
    except SparseportError as error:
        return [str(error)]


def _positions(folder: Path, name: str) -> int:
    """Byte offset in the .bin file of a named constant, found in the .xml."""
    import xml.etree.ElementTree as ElementTree

    for layer in ElementTree.parse(folder / "openvino_model.xml").iter("layer"):
        if layer.get("name") == name:
            data = layer.find("data")
            assert data is not None
            return int(data.attrib["offset"])
    raise AssertionError(f"no constant {name}")


@pytest.mark.parametrize("suffix", ["codes", "zero_points", "scales"])
@pytest.mark.parametrize("bit", range(8))
def test_one_bit_in_a_weight_names_the_layer(copy: Path, suffix: str, bit: int) -> None:
    module = "model.layers.1.mlp.up_proj"
    _flip(copy / "openvino_model.bin", _positions(copy, f"{module}.{suffix}") + 5, bit)
    found = verify(copy).differences
    assert any("openvino_model.bin: content changed" in line for line in found)
    assert any(f"weight {module} changed" in line for line in found)


def test_one_bit_in_a_norm_names_the_tensor(copy: Path) -> None:
    _flip(copy / "openvino_model.bin", _positions(copy, "model.norm.weight") + 2, 3)
    assert any("tensor model.norm.weight changed" in line for line in verify(copy).differences)


def test_any_bit_in_any_file(tiny_qa: Any, copy: Path) -> None:
    dice = random.Random(7)
    original = tiny_qa[1].folder
    for path in sorted(copy.iterdir()):
        size = path.stat().st_size
        for _ in range(6 if size < 1 << 20 else 3):
            _flip(path, dice.randrange(size), dice.randrange(8))
            assert any(path.name in line or "certificate" in line for line in _differences(copy)), path.name
            shutil.copyfile(original / path.name, path)
    assert verify(copy).differences == []


def test_xml_that_points_elsewhere(copy: Path) -> None:
    """Two layers' codes exchanged in the xml: every byte of the .bin is as certified, and it is found all the same."""
    xml = copy / "openvino_model.xml"
    one, two = (_positions(copy, f"model.layers.{i}.mlp.up_proj.codes") for i in (0, 1))
    text = xml.read_text()
    text = text.replace(f'offset="{one}"', 'offset="@"').replace(f'offset="{two}"', f'offset="{one}"')
    xml.write_text(text.replace('offset="@"', f'offset="{two}"'))
    found = verify(copy).differences
    assert {f"openvino_model.bin: weight model.layers.{i}.mlp.up_proj changed" for i in (0, 1)} <= set(found)


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml", "config.json", "openvino_tokenizer.bin"])
def test_missing_truncated_and_extended_files(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    for content in (data[:-1], data + b"\0"):
        (copy / name).write_bytes(content)
        assert any(name in line for line in _differences(copy))
    (copy / name).unlink()
    assert any(f"{name}: missing" in line for line in _differences(copy))


def test_file_behind_a_link_is_not_the_file(copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.bin"
    (copy / "openvino_model.bin").rename(moved)
    (copy / "openvino_model.bin").symlink_to(moved)
    assert any("openvino_model.bin: missing" in line for line in _differences(copy))


def test_extra_files(copy: Path) -> None:
    (copy / ".hidden").write_text("x")
    assert verify(copy).differences == [".hidden: not in the certificate"]
    assert verify(copy, strict=False).differences == []


def test_no_certificate(copy: Path) -> None:
    (copy / "sparseport.json").unlink()
    with pytest.raises(VerificationError, match="no certificate"):
        verify(copy)


def test_exit_codes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--quiet"]) == 0
    assert "0 differences" in capsys.readouterr().out
    _flip(copy / "openvino_model.bin", _positions(copy, "model.layers.0.mlp.up_proj.codes"), 0)
    assert main(["verify", str(copy), "--quiet"]) == 5
    assert "E_VERIFY" in capsys.readouterr().err


def test_read_back_decodes_like_openvino(copy: Path) -> None:
    """Second opinion on our nibble decoding: OpenVINO's own Convert of every u4 constant."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    model = readback.read_model(copy / "openvino_model.xml")
    by_name = {item.name: item.weight for item in readback.weights(model)}
    checked = 0
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        if op.get_type_name() == "Constant" and name.endswith(".codes"):
            probe = ov.Model([ops.convert(op, "u8")], [], "probe")
            decoded = ov.Core().compile_model(probe, "CPU")({})[0]
            codes = by_name[name.removesuffix(".codes")].codes  # type: ignore[union-attr]
            assert np.array_equal(decoded.reshape(codes.shape), codes)
            checked += 1
    assert checked == 14
