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
    "linears": {"model.q": {"shape": [2, 4], "rule": "carry"}},
    "files": {"a.bin": {"size": 3}},
    "totals": {"sparsity": "0.500000", "revived": 0},
    "text": 'é\n"\\',
    "none": None,
    "run": False,
}
GOLDEN = (
    b'{"certificate_sha256":"SEAL","files":{"a.bin":{"size":3}},"linears":{"model.q":{"rule":"carry","shape":[2,4]}},'
    b'"none":null,"run":false,"schema":1,"text":"\\u00e9\\n\\"\\\\","totals":{"revived":0,"sparsity":"0.500000"}}\n'
)
UNSEALED = GOLDEN.replace(b'"certificate_sha256":"SEAL",', b"").rstrip(b"\n")


def put(folder: Path, data: bytes) -> Path:
    (folder / FILE_NAME).write_bytes(data)
    return folder


def resealed(body):
    return canonical({**body, "certificate_sha256": hashlib.sha256(canonical(body)).hexdigest()}) + b"\n"


def test_canonical_form_and_seal():
    assert canonical(BODY) == UNSEALED
    assert canonical(dict(reversed(BODY.items()))) == UNSEALED
    seal = hashlib.sha256(UNSEALED).hexdigest()
    assert seal == "c7491a317aaeb0c0a5514ce5689527b722d18249f926e0e2f637e82c58674013"
    assert Certificate(BODY).sealed() == GOLDEN.replace(b"SEAL", seal.encode())


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
        lambda text: text.replace(b'"rule"', b'"r\\u0075le"'),
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
    body = {"schema": SCHEMA, "value": value}
    Certificate(body).write(folder)
    assert Certificate.read(folder).body == body


@pytest.mark.parametrize("value", [0.5, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, x], lambda x: {"a": {"b": [x]}}, lambda x: (x,)])
def test_floats_do_not_go_in(value, wrap):
    with pytest.raises(TypeError, match="no floats"):
        Certificate({"schema": 1, "value": wrap(value)}).sealed()


def test_a_float_with_a_right_looking_seal_is_refused(tmp_path):
    body = b'{"schema":1,"value":0.5}'
    seal = hashlib.sha256(body).hexdigest().encode()
    data = b'{"certificate_sha256":"' + seal + b'",' + body[1:] + b"\n"
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


def test_file_facts(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "f").write_bytes(data)
    assert file_facts(tmp_path / "f") == {"sha256": hashlib.sha256(data).hexdigest(), "size": 1_280_000}


def test_decimals():
    assert [decimal(x) for x in (0.5, 1 / 3, 2)] == ["0.500000", "0.333333", "2.000000"]
    assert decimal(1e-5, 3) == "0.000"
