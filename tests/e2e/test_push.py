"""A push against a hub in this process: what arrives is compared with the certificate, and every failure is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_server import TOKEN, Hub, Stored, drop, fail, running_hub
from sparseport.cli import main
from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, SparseportError, UsageError, VerificationError
from sparseport.integrations import hub as client
from sparseport.integrations import push as pushing
from sparseport.integrations.push import Push, check_names, plan_push, push
from sparseport.verify.certificate import Certificate

pytest.importorskip("onnxruntime_genai")
huggingface_hub = pytest.importorskip("huggingface_hub")

# The only connections are to 127.0.0.1.
pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")]
REPO = "me/model-1.0_x"


class InProcess:
    """Stands in for `Child`: the step runs here, where the library's settings are patched."""

    def __init__(self, module: str, request: dict[str, Any], environment: dict[str, str], show_errors: bool) -> None:
        assert module == client.__name__ and "HF_HUB_OFFLINE" not in environment
        self._request = request

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self) -> dict[str, Any]:
        return client.upload(**self._request)


@pytest.fixture(scope="module")
def exported(tiny_both: Any) -> Path:
    return Path(tiny_both[1].folder)


@pytest.fixture(scope="module")
def planned(exported: Path) -> Push:
    return plan_push(exported)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub, and an environment that leads there."""
    with running_hub() as hub:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (
            ("HF_ENDPOINT", hub.endpoint),
            ("HF_TOKEN", TOKEN),
            ("HF_HOME", str(tmp_path / "hf")),
            ("HF_HUB_DISABLE_XET", "1"),
        ):
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def send(hub: Hub, planned: Push, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Push the folder of both targets, or another plan, in this process; retries do not wait."""
    from huggingface_hub import close_session, constants

    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(pushing, "Child", InProcess)

    def send(plan: Push = planned, **options: Any) -> dict[str, Any]:
        return push(plan, REPO, **options)

    yield send
    close_session()


def there(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    files = hub.repositories[REPO].at(revision)
    assert files is not None
    return {name: stored.data for name, stored in files.items()}


def local(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_command_in_a_process_of_its_own(hub: Hub, exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One commit with every file, and both seals in its message; the token is never shown."""
    assert main(["push", str(exported), REPO, "--private", "--json"]) == 0
    out, err = capfd.readouterr()
    said = json.loads(out)
    repository = hub.repositories[REPO]
    assert there(hub) == local(exported) | {".gitattributes": b"*.bin filter=lfs\n"}
    assert len(repository.messages) == 2 and repository.private
    seals = {target: Certificate.read(exported / target).seal() for target in ("openvino", "onnx")}
    assert all(f"{target} {seal}" in repository.messages[1] for target, seal in seals.items())
    assert said["certificate_sha256"] == seals and said["commit"] == repository.branches["main"]
    assert said["url"].endswith(REPO) and said["private"] and not said["unchanged"]
    assert said["files"] == len(local(exported)) and said["others"] == [".gitattributes"]
    assert TOKEN not in out + err and "pushing" in err


def test_a_refused_token_in_a_process_of_its_own(
    hub: Hub, exported: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = TOKEN.replace("Secret", "Public")
    monkeypatch.setenv("HF_TOKEN", wrong)
    assert main(["push", str(exported / "onnx"), REPO, "--quiet"]) == 8
    out, err = capfd.readouterr()
    assert "error[E_TOKEN]" in err and "401" in err and "hf auth login" in err and wrong not in out + err
    assert hub.repositories == {}


def test_the_same_again_is_no_new_commit(hub: Hub, send: Callable[..., Any]) -> None:
    first = send()
    with pytest.raises(OutputExists) as caught:
        send()
    assert "--exist-ok" in str(caught.value.fix)
    again = send(exist_ok=True)
    assert again["unchanged"] and again["commit"] == first["commit"] and len(hub.repositories[REPO].messages) == 2


def test_a_branch_is_made_and_main_stays(hub: Hub, send: Callable[..., Any], exported: Path) -> None:
    said = send(revision="v1/int4")
    assert said["revision"] == "v1/int4" and set(there(hub)) == {".gitattributes"}
    assert there(hub, "v1/int4") == local(exported) | there(hub)


def test_private_is_never_pushed_to_where_everybody_reads(hub: Hub, send: Callable[..., Any]) -> None:
    hub.create(REPO, private=False)
    with pytest.raises(UsageError, match="everybody can read") as caught:
        send(private=True, exist_ok=True)
    assert caught.value.code == "E_PUBLIC" and "preupload" not in hub.asked and set(there(hub)) == {".gitattributes"}


@pytest.mark.parametrize(
    ("endpoint", "fault", "kind", "code", "words"),
    [
        ("create", fail(401), EnvironmentProblem, "E_TOKEN", "hf auth login"),
        ("create", fail(500), EnvironmentProblem, "E_HUB", "creating the repository"),
        ("create", drop(), EnvironmentProblem, "E_HUB", "the connection to the hub failed"),
        ("info", fail(404), BadInput, "E_REPO", "look at the names"),
        ("preupload", fail(403, "read only"), EnvironmentProblem, "E_TOKEN", "read only"),
        ("preupload", fail(503), EnvironmentProblem, "E_HUB", "uploading"),
        ("batch", fail(422, "too large"), BadInput, "E_HUB", "too large"),
        ("object", fail(503), EnvironmentProblem, "E_HUB", "uploading"),
        ("object", drop(), EnvironmentProblem, "E_HUB", "the connection to the hub failed"),
        ("commit", fail(409, "somebody else committed"), EnvironmentProblem, "E_HUB", "somebody else committed"),
        ("commit", fail(500), EnvironmentProblem, "E_HUB", "not known whether the commit arrived"),
        ("commit", drop(), EnvironmentProblem, "E_HUB", "not known whether the commit arrived"),
        ("tree", fail(502), EnvironmentProblem, "E_HUB", "the commit that is there was not compared"),
        ("preupload", fail(400, f"you sent {TOKEN}\x1b[2J"), BadInput, "E_HUB", "you sent ***"),
    ],
)
def test_failures(
    hub: Hub, send: Callable[..., Any], endpoint: str, fault: Any, kind: type[SparseportError], code: str, words: str
) -> None:
    """Each is told as what it is, without the token, and leaves no commit behind if it came before one."""
    hub.faults[endpoint] = fault
    with pytest.raises(kind) as caught:
        send()
    error = caught.value
    assert error.code == code and words in str(error) and TOKEN not in repr(error.as_dict()) + str(error.__cause__)
    assert "\x1b" not in str(error) and error.__suppress_context__
    commits = len(hub.repositories[REPO].messages) if REPO in hub.repositories else 1
    assert commits == (2 if endpoint == "tree" else 1)


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [("object", drop(1)), ("object", fail(503, times=2)), ("preupload", drop(1)), ("batch", fail(500, times=1))],
)
def test_what_passes_by_itself_does_no_harm(
    hub: Hub, send: Callable[..., Any], exported: Path, endpoint: str, fault: Any
) -> None:
    hub.faults[endpoint] = fault
    send()
    assert there(hub).items() >= local(exported).items() and len(hub.repositories[REPO].messages) == 2


def test_after_a_failure_the_same_command_goes_on(hub: Hub, send: Callable[..., Any]) -> None:
    hub.faults["commit"] = fail(500, times=1)
    with pytest.raises(EnvironmentProblem) as caught:
        send()
    assert "--exist-ok" in str(caught.value.fix)
    hub.asked.clear()
    send(exist_ok=True)
    assert "object" not in hub.asked  # what was uploaded is not sent again


def _flip(files: dict[str, Stored], name: str) -> None:
    data = bytearray(files[name].data)
    data[len(data) // 2] ^= 1
    files[name] = Stored(bytes(data), files[name].large)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: _flip(files, "openvino/openvino_model.bin"), "openvino/openvino_model.bin: content changed"),
        (lambda files: _flip(files, "onnx/genai_config.json"), "onnx/genai_config.json: content changed"),
        (lambda files: _flip(files, "onnx/sparseport.json"), "onnx/sparseport.json: content changed"),
        (lambda files: files.pop("onnx/tokenizer.json"), "onnx/tokenizer.json: not in the repository"),
        (
            lambda files: files.update({"onnx/model.onnx.data": Stored(b"short", True)}),
            "onnx/model.onnx.data: 5 bytes, certified",
        ),
    ],
)
def test_what_is_altered_there_is_found(hub: Hub, send: Callable[..., Any], change: Any, told: str) -> None:
    hub.on_commit = change
    with pytest.raises(VerificationError, match="not what was certified") as caught:
        send()
    assert told in str(caught.value) and REPO in str(caught.value)


def test_a_certificate_that_comes_back_differently_is_found(hub: Hub, send: Callable[..., Any]) -> None:
    """The listing is right, what is served is not."""

    def serve(handler: Any) -> bool:
        if "/onnx/" not in handler.path.replace("%2F", "/"):
            return False
        handler.answer(b"{}", 200, {"X-Repo-Commit": handler.path.split("/")[4], "ETag": '"0"'})
        return True

    hub.faults["resolve"] = serve
    with pytest.raises(VerificationError, match=r"onnx/sparseport.json: comes back as other bytes"):
        send()


@pytest.mark.parametrize("name", ["openvino/config.json", "openvino/openvino_model.bin"])
def test_what_changes_between_the_proof_and_the_upload_is_found(
    hub: Hub, send: Callable[..., Any], copied: Path, name: str
) -> None:
    plan = plan_push(copied)
    data = bytearray((copied / name).read_bytes())
    data[10] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(VerificationError, match=f"{name}: (content changed|changed in the folder)"):
        send(plan)


def test_what_does_not_verify_is_not_pushed(hub: Hub, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((copied / "onnx" / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copied / "onnx" / "model.onnx.data").write_bytes(data)
    assert main(["push", str(copied), REPO, "--quiet"]) == 5
    assert "model.onnx.data" in capsys.readouterr().err and hub.asked == []


def test_files_that_no_certificate_covers_are_named_or_refused(
    hub: Hub, send: Callable[..., Any], copied: Path
) -> None:
    (copied / "README.md").write_text("# A model\n")
    (copied / "onnx" / "notes.txt").write_text("by hand")
    for also in ((), ("README.md",), ("onnx/notes.txt",)):
        with pytest.raises(VerificationError, match=r"not in the certificate|beside the exported folders"):
            plan_push(copied, also)
    said = send(plan_push(copied, ["README.md", "onnx/notes.txt"]))
    assert there(hub).items() >= local(copied).items() and said["others"] == [".gitattributes"]


@pytest.mark.parametrize("also", ["nothing.md", "../secret", "onnx/config.json", "onnx/sparseport.json", "onnx"])
def test_what_cannot_go_along(exported: Path, also: str) -> None:
    (exported.parent / "secret").write_text("x")
    with pytest.raises(UsageError) as caught:
        plan_push(exported, [also])
    assert caught.value.where == "--also"


def test_a_dry_run_goes_nowhere(
    hub: Hub, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pushing, "find_spec", lambda name: None)
    assert main(["push", str(exported / "onnx"), REPO, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    listed = {file["name"]: file["size"] for file in said["files"]}
    assert listed == {name: len(data) for name, data in local(exported / "onnx").items()}
    assert said["certificate_sha256"] == {"onnx": Certificate.read(exported / "onnx").seal()} and hub.asked == []
    assert main(["push", str(exported / "onnx"), REPO, "--dry-run", "--quiet"]) == 0
    assert "nothing was sent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [("HF_HUB_OFFLINE", "1", "E_OFFLINE"), ("TRANSFORMERS_OFFLINE", "yes", "E_OFFLINE"), ("HF_TOKEN", "", "E_TOKEN")],
)
def test_what_stops_a_push_before_it_asks_anything(
    hub: Hub, send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(EnvironmentProblem) as caught:
        send()
    assert caught.value.code == code and caught.value.fix and hub.asked == []


def test_without_the_package(hub: Hub, send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="push to a hub") as caught:
        send()
    assert caught.value.fix == "pip install 'sparseport[hub]'"


@pytest.mark.parametrize("name", ["model", "me/", "/model", "me/a/b", "me/a b", "mé/a", "me/a\n", "me/.a", "-me/a"])
def test_names_that_no_hub_takes(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_names(name, None)
    assert caught.value.code == "E_REPO"


@given(st.text("aB0-_. /", max_size=8))
def test_what_huggingface_hub_refuses_is_refused_before(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        check_names(name, None)
    except BadInput:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        pytest.fail(f"{name!r} was let through")


def test_branches() -> None:
    check_names("me/Model-1.0_x", "refs/pr/1")
    for branch in ("", "a b", "a\n"):
        with pytest.raises(BadInput):
            check_names("me/a", branch)
