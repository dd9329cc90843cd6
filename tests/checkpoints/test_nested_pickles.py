"""Nested pickles: tensors and plain data come back whole, anything else is refused and nothing runs."""

from __future__ import annotations

import enum
import os
import sys
from collections import OrderedDict

import pytest

from in_process import InProcess
from sparseport.checkpoints import pickles
from sparseport.checkpoints.nncf_fq import NncfCheckpoint
from sparseport.checkpoints.pickles import convert_nested_pickle
from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import BadInput

torch = pytest.importorskip("torch")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pickles, "subprocess", InProcess)


def test_nested_pickle_comes_back_whole(quick, tmp_path):
    content = {
        "a/b": {"c": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T},
        "a": {"b": {"c": torch.tensor([1, 2])}, "b/c": torch.tensor([3])},
        "a~1b": {"c": torch.tensor(4.0)},
        "plain": OrderedDict(text="ü\n", none=None, yes=True, number=-(2**70), real=0.1, size=torch.Size([2, 3])),
        "list": [1, (torch.ones(2, dtype=torch.int32), "x"), []],
    }
    torch.save(content, tmp_path / "c.pth")
    plain = convert_nested_pickle(tmp_path / "c.pth", tmp_path / "c.safetensors")
    assert plain == {
        "a/b": {"c": None},
        "a": {"b": {"c": None}, "b/c": None},
        "a~1b": {"c": None},
        "plain": {"text": "ü\n", "none": None, "yes": True, "number": -(2**70), "real": 0.1, "size": [2, 3]},
        "list": [1, [None, "x"], []],
    }
    with SafeTensorsFile.open(tmp_path / "c.safetensors") as file:
        read = {name: file.read(name).tolist() for name in file.names()}
        assert file.info("/a~1b/c").stored == "BF16"
    assert read == {
        "/a~1b/c": [[0, 3], [1, 4], [2, 5]],
        "/a/b/c": [1, 2],
        "/a/b~1c": [3],
        "/a~01b/c": 4.0,
        "/list/1/0": [1, 1],
    }


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_pickle_that_runs_code_does_not(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "nncf_checkpoint.pth"
    torch.save({"nncf_state_dict": {}, "nncf_config": Evil(canary)}, path)
    torch.load(path, weights_only=False)
    assert canary.is_dir()  # so the canary sings when the code does run
    canary.rmdir()
    with pytest.raises(BadInput, match=r"asks for (posix|nt)\.mkdir") as caught:
        NncfCheckpoint.open(path, allow_pickle=True)
    assert caught.value.code == "E_PICKLE" and str(path) in str(caught.value)
    assert not canary.exists()


def laughs():
    value = ["ha"]
    for _ in range(9):
        value = [value] * 9
    return value


def endless():
    value = []
    value.append(value)
    return value


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"x": value}
    return value


SHARED = torch.ones(1 << 20)
REFUSED = {
    "no mapping": ([1], "not a mapping"),
    "number as key": ({"x": {1: 2}}, "key that is no text"),
    "set": ({"x": {1, 2}}, "at /x is a set"),
    "bytes": ({"x": b"1"}, "at /x is a bytes"),
    "complex": ({"x": 1j}, "at /x is a complex"),
    "NaN": ({"x": float("nan")}, "JSON compliant"),
    "too deep": (nested(17), "deeper than 16"),
    "endless": ({"x": endless()}, "deeper than 16"),
    "many laughs": ({"x": laughs()}, "limit on nodes"),
    "much text": ({"x": ["y" * 100_000] * 700}, "limit on text"),
    "stretched tensor": ({"x": torch.ones(1).expand(10**6, 10**6)}, "more elements than are stored"),
    "one tensor often": ({"x": [SHARED] * 8}, "limit on bytes"),
    "sparse tensor": ({"x": torch.eye(3).to_sparse()}, "not a plain one"),
    "enumeration by another name": ({"x": Evil("x")}, "mkdir"),
}


@pytest.mark.parametrize(("content", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_data_is_refused(quick, tmp_path, monkeypatch, content, text):
    monkeypatch.setattr(pickles, "_NODES", 10_000)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(BadInput, match=text) as caught:
        convert_nested_pickle(tmp_path / "c.pth", tmp_path / "c.safetensors")
    assert caught.value.code == "E_PICKLE" and str(tmp_path / "c.pth") in str(caught.value)


class Scheme(str, enum.Enum):
    ONE = "one"


class Sham:
    """Pickled as a member of Scheme whose value is no text."""

    def __reduce__(self):
        return Scheme, (["one"],)


def test_enumerations_are_read_as_text_if_they_are_named(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])
    monkeypatch.setattr(Scheme, "__module__", "elsewhere")
    path, target = tmp_path / "c.pth", tmp_path / "c.safetensors"
    torch.save({"x": Scheme.ONE}, path)
    with pytest.raises(BadInput, match=r"asks for elsewhere\.Scheme"):
        convert_nested_pickle(path, target)
    plain = convert_nested_pickle(path, target, text_enums=["elsewhere.Scheme"])
    assert plain == {"x": "one"} and type(plain["x"]) is str
    torch.save({"x": Sham()}, path)
    with pytest.raises(BadInput, match="cannot read it"):
        convert_nested_pickle(path, target, text_enums=["elsewhere.Scheme"])


def test_limits_leave_room_for_real_checkpoints(quick, tmp_path):
    """Sixteen levels, and one tensor under two names, as state dict and model state have them."""
    torch.save({"x": nested(15), "a": SHARED, "b": SHARED}, tmp_path / "c.pth")
    plain = convert_nested_pickle(tmp_path / "c.pth", tmp_path / "c.safetensors")
    assert plain == {"x": nested(15), "a": None, "b": None}


def test_a_file_that_is_no_pickle(quick, tmp_path):
    (tmp_path / "c.pth").write_text("hello")
    with pytest.raises(BadInput, match="cannot read it") as caught:
        convert_nested_pickle(tmp_path / "c.pth", tmp_path / "c.safetensors")
    assert "weights_only" not in str(caught.value)  # torch recommends to switch the protection off


def test_a_child_that_does_not_end(tmp_path, monkeypatch):
    (tmp_path / "c.pth").write_text("hello")
    monkeypatch.setattr(pickles, "_SECONDS", 0.01)
    with pytest.raises(BadInput, match=r"no end after 0\.01 s"):
        convert_nested_pickle(tmp_path / "c.pth", tmp_path / "c.safetensors")
