"""The certificate: one canonical form, and no change goes unseen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import Unsupported, VerificationError
from sparseport.verify.certificate import FILE_NAME, SCHEMA, Certificate, canonical, decimal, file_facts

BODY = {
    "schema": 1,
    "linears": {"q": {"shape": [2, 4], "readback": {"openvino": "ab"}}},
    "tensors": {},
    "files": {"a.bin": {"size": 3, "sha256": "cd"}},
    "numerics": {"kl": "1e-9"},
    "totals": {"sparsity": "0.500000", "revived": 0},
    "text": 'é\n"\\',
    "none": None,
    "run": False,
}
CANONICAL = (
    b'{"files":{"a.bin":{"sha256":"cd","size":3}},"linears":{"q":{"readback":{"openvino":"ab"},"shape":[2,4]}},'
    b'"none":null,"numerics":{"kl":"1e-9"},"run":false,"schema":1,"tensors":{},"text":"\\u00e9\\n\\"\\\\",'
    b'"totals":{"revived":0,"sparsity":"0.500000"}}'
)


def put(folder: Path, data: bytes) -> Path:
    (folder / FILE_NAME).write_bytes(data)
    return folder


def resealed(body):
    return Certificate(body).sealed()


def test_canonical_form_and_seal():
    assert canonical(BODY) == CANONICAL
    assert canonical(dict(reversed(BODY.items()))) == CANONICAL
    # By hand: the proof is the digest without the measured logits, the seal that of all with the proof in its place.
    proof = hashlib.sha256(CANONICAL.replace(b'"numerics":{"kl":"1e-9"},', b"")).hexdigest()
    proven = CANONICAL.replace(b'"run"', b'"proof_sha256":"%s","run"' % proof.encode())
    seal = hashlib.sha256(proven).hexdigest()
    assert Certificate(BODY).sealed() == b'{"certificate_sha256":"%s",' % seal.encode() + proven[1:] + b"\n"


def test_what_was_written_is_read(tmp_path):
    Certificate(BODY).write(tmp_path)
    certificate = Certificate.read(tmp_path)
    assert certificate.body == BODY and certificate == Certificate(BODY)
    assert certificate.linears == BODY["linears"] and certificate.files == BODY["files"]
    assert certificate.totals == BODY["totals"]
    assert (tmp_path / FILE_NAME).read_bytes() == certificate.sealed()


def test_every_changed_byte_is_found(tmp_path):
    whole = Certificate(BODY).sealed()
    for place in range(len(whole)):
        becomes = {whole[place] ^ 1 << bit for bit in range(8)} | set(b' \t\n09"ae')
        for value in becomes - {whole[place]}:
            data = bytearray(whole)
            data[place] = value
            with pytest.raises(VerificationError):
                Certificate.read(put(tmp_path, bytes(data)))


def test_every_missing_or_extra_byte_is_found(tmp_path):
    whole = Certificate(BODY).sealed()
    for place in range(len(whole)):
        with pytest.raises(VerificationError):
            Certificate.read(put(tmp_path, whole[:place] + whole[place + 1 :]))
        with pytest.raises(VerificationError):
            Certificate.read(put(tmp_path, whole[:place]))
        for extra in (b" ", b"\n", b"0", b'"'):
            with pytest.raises(VerificationError):
                Certificate.read(put(tmp_path, whole[:place] + extra + whole[place:]))


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b'"revived":0', b'"revived":0,"revived":0'),
        lambda text: text.replace(b'"revived":0', b'"revived":0.0'),
        lambda text: text.replace(b'"revived":0', b'"revived":-0'),
        lambda text: text.replace(b'"revived":0', b'"revived":NaN'),
        lambda text: text.replace(b'"revived":0', b'"revived":false'),
        lambda text: text.replace(b'"run":false', b'"run":0'),
        lambda text: text.replace(b'"shape"', b'"sh\\u0061pe"'),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + text,
        lambda text: b"[" + text + b"]",
        lambda text: json.dumps(json.loads(text), indent=2).encode(),
        lambda text: b"",
        lambda text: b"[" * 100_000,
    ],
)
def test_other_spellings_are_refused(tmp_path, edit):
    whole = Certificate(BODY).sealed()
    edited = edit(whole)
    assert edited != whole
    with pytest.raises(VerificationError) as caught:
        Certificate.read(put(tmp_path, edited))
    assert caught.value.exit_code == 5 and FILE_NAME in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_body_of_integers_and_strings_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("certificate")
    body = {**BODY, "value": value}
    Certificate(body).write(folder)
    assert Certificate.read(folder).body == body


@pytest.mark.parametrize("value", [0.5, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, x], lambda x: {"a": {"b": [x]}}, lambda x: (x,)])
def test_floats_do_not_go_in(value, wrap):
    with pytest.raises(TypeError, match="no floats"):
        Certificate({"schema": 1, "value": wrap(value)}).sealed()


def test_a_float_with_a_right_looking_seal_is_refused(tmp_path):
    data = Certificate({**BODY, "value": "0.5"}).sealed().replace(b'"0.5"', b"0.5")
    with pytest.raises(VerificationError, match="no floats"):
        Certificate.read(put(tmp_path, data))


def test_a_folder_without_certificate_is_named(tmp_path):
    with pytest.raises(VerificationError, match="no certificate") as caught:
        Certificate.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 5
    with pytest.raises(VerificationError, match="no certificate"):
        Certificate.read(tmp_path / "nothing")


def test_a_newer_schema_asks_for_an_upgrade(tmp_path):
    with pytest.raises(Unsupported, match="newer schema") as caught:
        Certificate.read(put(tmp_path, resealed({**BODY, "schema": SCHEMA + 1})))
    assert caught.value.exit_code == 7 and "upgrade" in str(caught.value)


@pytest.mark.parametrize("schema", [0, -1, "1", None, True, [1]])
def test_a_schema_that_never_was_is_refused(tmp_path, schema):
    with pytest.raises(VerificationError, match="unknown schema"):
        Certificate.read(put(tmp_path, resealed({**BODY, "schema": schema})))
    with pytest.raises(VerificationError, match="unknown schema"):
        Certificate.read(put(tmp_path, resealed({key: value for key, value in BODY.items() if key != "schema"})))


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": {}},
        {"files": {"a.bin": {"sha256": "cd"}}},
        {"linears": {"q": {"shape": [2, 4]}}},
        {"linears": {"q": {"shape": [2, 4], "readback": {}}}},
        {"tensors": {"norm": {"readback": {"openvino": "x"}}}},
        {"totals": None},
    ],
)
def test_a_resealed_certificate_without_its_parts_is_refused(tmp_path, change):
    with pytest.raises(VerificationError) as caught:
        Certificate.read(put(tmp_path, resealed({**BODY, **change})))
    assert caught.value.exit_code == 5


def test_file_facts(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "f").write_bytes(data)
    assert file_facts(tmp_path / "f") == {"sha256": hashlib.sha256(data).hexdigest(), "size": 1_280_000}


def test_decimals():
    assert [decimal(x) for x in (0.5, 1 / 3, 2)] == ["0.500000", "0.333333", "2.000000"]
    assert decimal(1e-5, 3) == "0.000"
