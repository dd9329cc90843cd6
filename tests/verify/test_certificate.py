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

TOTALS = {
    "int4_linears": 1,
    "linears": 1,
    "masked_weights": 8,
    "pruned": 4,
    "revived": 0,
    "sparsity": "0.500000",
    "weights": 8,
}
BODY = {
    "schema": 1,
    "sparseport": "1.0",
    "linears": {"q": {"shape": [2, 4], "readback": {"openvino": "ab"}}},
    "tensors": {},
    "files": {"a.bin": {"size": 3, "sha256": "cd"}},
    "numerics": {"kl": "1e-9"},
    "totals": TOTALS,
    "text": 'é\n"\\',
    "none": None,
    "run": False,
}
CANONICAL = (
    b'{"files":{"a.bin":{"sha256":"cd","size":3}},"linears":{"q":{"readback":{"openvino":"ab"},"shape":[2,4]}},'
    b'"none":null,"numerics":{"kl":"1e-9"},"run":false,"schema":1,"sparseport":"1.0","tensors":{},'
    b'"text":"\\u00e9\\n\\"\\\\","totals":{"int4_linears":1,"linears":1,"masked_weights":8,"pruned":4,"revived":0,'
    b'"sparsity":"0.500000","weights":8}}'
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
    # In place and in one open file: making thousands of files anew is what takes time.
    with (put(tmp_path, whole) / FILE_NAME).open("r+b", buffering=0) as file:
        for place in range(len(whole)):
            becomes = {whole[place] ^ 1 << bit for bit in range(8)} | set(b' \t\n09"ae')
            for value in (*(becomes - {whole[place]}), whole[place]):
                file.seek(place)
                file.write(bytes([value]))
                if value != whole[place]:
                    with pytest.raises(VerificationError):
                        Certificate.read(tmp_path)
    assert Certificate.read(tmp_path).body == BODY


def test_every_missing_or_extra_byte_is_found(tmp_path):
    whole = Certificate(BODY).sealed()
    for place in range(len(whole)):
        with pytest.raises(VerificationError):
            Certificate.read(put(tmp_path, whole[:place] + whole[place + 1 :]))
        with pytest.raises(VerificationError):
            Certificate.read(put(tmp_path, whole[:place]))
        for extra in (b" ", b"\n", b"0"):
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


LINEAR = {"shape": [2, 4], "readback": {"openvino": "ab"}}
BRANCH = {"branch_sha256": "ab", "source_sha256": "cd", "readback": {"openvino": "ab"}}
JUNK = (None, True, 1, -1, "x", [], ["x"], {}, {"a": 1})
MISSING = object()


def with_value(body, path, value):
    """The body with one value replaced, or left out."""
    key, *rest = path
    if rest:
        return {**body, key: with_value(body[key], rest, value)}
    return {k: v for k, v in {**body, key: value}.items() if v is not MISSING}


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        (["sparseport"], ("x",)),
        (["files"], ()),
        (["files", "a.bin"], ()),
        (["files", "a.bin", "size"], (1,)),
        (["files", "a.bin", "sha256"], ("x",)),
        (["linears"], ({},)),
        (["linears", "q"], (MISSING,)),
        (["linears", "q", "shape"], ([],)),
        (["linears", "q", "readback"], ()),
        (["linears", "q", "readback", "openvino"], ("x",)),
        (["linears", "q", "group_size"], (1, MISSING)),
        (["linears", "q", "tied_head"], (True, MISSING)),
        (["linears", "q", "branch", "branch_sha256"], ("x",)),
        (["linears", "q", "branch", "source_sha256"], ("x", MISSING)),
        (["tensors"], ({},)),
        (["tensors", "norm"], (MISSING,)),
        (["tensors", "norm", "shape"], ([],)),
        (["tensors", "norm", "readback"], ()),
        (["totals"], ()),
        *((["totals", key], ("x",) if key == "sparsity" else (1,)) for key in TOTALS),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) else "values",
)
def test_a_resealed_certificate_has_its_parts_in_their_types(tmp_path, path, fits):
    """Whatever somebody puts in and seals anew, reading it is an error or gives the types that every user relies on."""
    body = {**BODY, "linears": {"q": {**LINEAR, "group_size": 4, "branch": BRANCH}}, "tensors": {"norm": LINEAR}}
    assert Certificate.read(put(tmp_path, resealed(body))).body == body
    for value in (MISSING, *JUNK):
        changed = put(tmp_path, resealed(with_value(body, path, value)))
        if any(type(value) is type(good) and value == good for good in fits):
            Certificate.read(changed)
            continue
        with pytest.raises(VerificationError) as caught:
            Certificate.read(changed)
        assert caught.value.exit_code == 5 and FILE_NAME in str(caught.value), value


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "a/../b", "", ".", "a//b", "a\0b", "..\\a", "C:a", "x" * 256])
def test_files_lie_in_the_folder(tmp_path, name):
    with pytest.raises(VerificationError, match="outside the folder"):
        Certificate.read(put(tmp_path, resealed({**BODY, "files": {name: {"size": 3, "sha256": "cd"}}})))


def test_certificates_of_exports_have_what_is_asked_for():
    """The names that the exporter writes are the ones that reading asks for."""
    from sparseport.evidence import totals

    facts = {"shape": [2, 4], "pruned": 4, "revived": 0, "bits": 4}
    assert totals({"q": facts}) == TOTALS


def test_file_facts(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "f").write_bytes(data)
    assert file_facts(tmp_path / "f") == {"sha256": hashlib.sha256(data).hexdigest(), "size": 1_280_000}


def test_decimals():
    assert [decimal(x) for x in (0.5, 1 / 3, 2)] == ["0.500000", "0.333333", "2.000000"]
    assert decimal(1e-5, 3) == "0.000"
