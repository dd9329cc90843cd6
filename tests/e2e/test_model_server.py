"""A model repository as OpenVINO Model Server reads it: its config, its graph, and the pipeline that it runs.

The server itself is not run here. Its messages are described below (name, number and type of each field, from
mediapipe/framework/calculator.proto, sync_set_input_stream_handler.proto and src/llm/llm_calculator.proto), so that
graph.pbtxt is read by protobuf's own parser, which refuses what it does not know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from sparseport import cli
from sparseport.errors import (
    BadInput,
    EnvironmentProblem,
    OutputExists,
    SparseportError,
    Unsupported,
    UsageError,
    VerificationError,
)
from sparseport.integrations.model_server import add_servable
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import verify
from sparseport.verify.runs import OPENVINO_FULL_PRECISION

openvino_genai = pytest.importorskip("openvino_genai")

Field = descriptor_pb2.FieldDescriptorProto
ONE, MANY = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED
TEXT, FLAG, SIZE, COUNT = Field.TYPE_STRING, Field.TYPE_BOOL, Field.TYPE_UINT64, Field.TYPE_UINT32
# Message -> its fields: name, number, label, type or the name of a message.
MESSAGES: dict[str, list[tuple[str, int, Any, Any]]] = {
    "InputStreamInfo": [("tag_index", 1, ONE, TEXT), ("back_edge", 2, ONE, FLAG)],
    "MediaPipeOptions": [],
    "SyncSet": [("tag_index", 1, MANY, TEXT)],
    "SyncSetInputStreamHandlerOptions": [("sync_set", 1, MANY, "SyncSet")],
    "InputStreamHandlerConfig": [("input_stream_handler", 1, ONE, TEXT), ("options", 3, ONE, "MediaPipeOptions")],
    "Node": [
        ("name", 1, ONE, TEXT),
        ("calculator", 2, ONE, TEXT),
        ("input_stream", 3, MANY, TEXT),
        ("output_stream", 4, MANY, TEXT),
        ("input_side_packet", 5, MANY, TEXT),
        ("node_options", 8, MANY, ".google.protobuf.Any"),
        ("input_stream_handler", 11, ONE, "InputStreamHandlerConfig"),
        ("input_stream_info", 13, MANY, "InputStreamInfo"),
    ],
    "CalculatorGraphConfig": [
        ("node", 1, MANY, "Node"),
        ("input_stream", 10, MANY, TEXT),
        ("output_stream", 15, MANY, TEXT),
    ],
    "LLMCalculatorOptions": [
        ("models_path", 1, ONE, TEXT),
        ("max_num_batched_tokens", 2, ONE, SIZE),
        ("cache_size", 3, ONE, SIZE),
        ("max_num_seqs", 4, ONE, SIZE),
        ("dynamic_split_fuse", 5, ONE, FLAG),
        ("device", 6, ONE, TEXT),
        ("plugin_config", 7, ONE, TEXT),
        ("best_of_limit", 8, ONE, COUNT),
        ("max_tokens_limit", 9, ONE, COUNT),
        ("enable_prefix_caching", 10, ONE, FLAG),
    ],
}


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    any_file = descriptor_pb2.FileDescriptorProto(name="any.proto", package="google.protobuf", syntax="proto3")
    any_file.message_type.add(name="Any")
    any_file.message_type[0].field.add(name="type_url", number=1, label=ONE, type=TEXT)
    any_file.message_type[0].field.add(name="value", number=2, label=ONE, type=Field.TYPE_BYTES)
    pool.Add(any_file)
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", dependency=["any.proto"])
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, label, kind in fields:
            if isinstance(kind, str):
                name_of = kind if kind.startswith(".") else f".mediapipe.{kind}"
                message.field.add(name=field, number=number, label=label, type=Field.TYPE_MESSAGE, type_name=name_of)
            else:
                message.field.add(name=field, number=number, label=label, type=kind)
    by_name = {message.name: message for message in file.message_type}
    by_name["MediaPipeOptions"].extension_range.add(start=20000, end=536870912)
    by_name["SyncSetInputStreamHandlerOptions"].extension.add(
        name="ext",
        number=155816273,
        label=ONE,
        type=Field.TYPE_MESSAGE,
        type_name=".mediapipe.SyncSetInputStreamHandlerOptions",
        extendee=".mediapipe.MediaPipeOptions",
    )
    pool.Add(file)
    return pool


POOL = _pool()


def parsed(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The graph of a model, the options of its calculator, and the runtime's properties in them."""
    graph = message_factory.GetMessageClass(POOL.FindMessageTypeByName("mediapipe.CalculatorGraphConfig"))()
    text = (folder / "graph.pbtxt").read_text(encoding="utf-8")
    text_format.Parse(text, graph, descriptor_pool=POOL)
    (packed,) = graph.node[0].node_options
    assert packed.type_url == "type.googleapis.com/mediapipe.LLMCalculatorOptions"
    options = message_factory.GetMessageClass(POOL.FindMessageTypeByName("mediapipe.LLMCalculatorOptions"))()
    options.ParseFromString(packed.value)
    return graph, options, json.loads(options.plugin_config or "{}")


def served(config: Path, name: str) -> Path:
    """The folder that the server would load for a name: base_path by config.json, models_path by base_path."""
    (entry,) = [one for one in json.loads(config.read_text("utf-8"))["mediapipe_config_list"] if one["name"] == name]
    base = config.parent / entry["base_path"]
    _, options, _ = parsed(base)
    return base / options.models_path


@pytest.fixture(scope="module")
def exported(tiny_both: Any) -> Path:
    """An OpenVINO folder with its tokenizer."""
    folder: Path = tiny_both[0].output / "openvino"
    return folder


def test_the_graph_is_what_the_server_wants(exported: Path, tmp_path: Path) -> None:
    made = add_servable(exported, tmp_path / "models", "mine", cache_size=2)
    assert (made.name, made.folder, made.config) == ("mine", tmp_path / "models/mine", tmp_path / "models/config.json")
    graph, options, settings = parsed(made.folder)
    (node,) = graph.node
    assert node.name and node.calculator == "HttpLLMCalculator"  # the server looks its resources up by the node's name
    assert list(node.input_side_packet) == ["LLM_NODE_RESOURCES:llm"]
    assert list(graph.input_stream) == ["HTTP_REQUEST_PAYLOAD:input"]
    assert list(graph.output_stream) == ["HTTP_RESPONSE_PAYLOAD:output"]
    assert set(node.input_stream) == {*graph.input_stream, "LOOPBACK:loopback"}
    assert set(node.output_stream) == {*graph.output_stream, "LOOPBACK:loopback"}
    (loop,) = node.input_stream_info
    assert (loop.tag_index, loop.back_edge) == ("LOOPBACK:0", True)
    handler = node.input_stream_handler
    extension = POOL.FindExtensionByName("mediapipe.SyncSetInputStreamHandlerOptions.ext")
    assert handler.input_stream_handler == "SyncSetInputStreamHandler"
    assert [list(one.tag_index) for one in handler.options.Extensions[extension].sync_set] == [["LOOPBACK:0"]]
    assert (options.models_path, options.device, options.cache_size) == ("./openvino", "CPU", 2) and settings == {}
    assert not options.HasField("plugin_config")
    assert json.loads(made.config.read_text("utf-8")) == {
        "model_config_list": [],
        "mediapipe_config_list": [{"name": "mine", "base_path": "mine"}],
    }


def test_the_parser_refuses_what_the_server_does_not_know(exported: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    made = add_servable(exported, tmp_path / "models", "mine")
    text = (made.folder / "graph.pbtxt").read_text("utf-8")
    for right, wrong in (("models_path", "model_path"), ("back_edge: true", 'back_edge: "yes"'), ("}\n}\n", "}\n")):
        assert right in text
        (made.folder / "graph.pbtxt").write_text(text.replace(right, wrong), encoding="utf-8")
        with pytest.raises(text_format.ParseError):
            parsed(made.folder)


def test_the_certified_folder_is_carried_along(exported: Path, tmp_path: Path) -> None:
    made = add_servable(exported, tmp_path / "models", "mine", precision="full")
    assert made.model == tmp_path / "models/mine/openvino"
    assert served(made.config, "mine").resolve() == made.model
    assert verify(made.model).ok and made.files == len(Certificate.read(made.model).files)
    assert (made.model / "sparseport.json").read_bytes() == (exported / "sparseport.json").read_bytes()
    assert Certificate.read(made.model).proof() in (made.folder / "graph.pbtxt").read_text("utf-8")
    assert made.settings == OPENVINO_FULL_PRECISION == parsed(made.folder)[2]
    assert not any((exported / name).samefile(made.model / name) for name in Certificate.read(exported).files)


def test_the_servers_pipeline_answers_as_the_export_does(exported: Path, tmp_path: Path) -> None:
    """The server's LLM calculator is `ContinuousBatchingPipeline` on models_path, with the graph's properties."""
    made = add_servable(exported, tmp_path / "models", "mine", precision="full")
    _, options, settings = parsed(made.folder)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(served(made.config, "mine")), scheduler, options.device, settings, {}
    )
    wanted = openvino_genai.LLMPipeline(str(exported), "CPU", **OPENVINO_FULL_PRECISION)
    config = openvino_genai.GenerationConfig(max_new_tokens=24, do_sample=False, apply_chat_template=False)
    for prompt in ("Say hello", "one, two, three"):
        (found,) = pipeline.generate([prompt], [config])
        assert found.m_generation_ids[0] == str(wanted.generate(prompt, config)) != ""


def test_hard_links_are_the_same_files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(exported, tmp_path / "out"))
    made = add_servable(source, tmp_path / "models", "mine", hard_links=True)
    names = Certificate.read(source).files
    assert made.linked and all((source / name).samefile(made.model / name) for name in names)
    assert not (source / "sparseport.json").samefile(made.model / "sparseport.json")
    shutil.rmtree(source)
    assert verify(made.model).ok

    def refuse(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("sparseport.integrations.model_server.os.link", refuse)
    with pytest.raises(UsageError, match="--hard-links"):
        add_servable(exported, tmp_path / "models", "other", hard_links=True)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["config.json", "mine"]


def test_a_repository_keeps_its_other_models(exported: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    others = {
        "model_config_list": [{"config": {"name": "resnet", "base_path": "resnet"}}],
        "mediapipe_config_list": [{"name": "old", "base_path": "elsewhere", "graph_path": "g.pbtxt"}],
        "monitoring": {"metrics": {"enable": True}},
    }
    (root / "config.json").write_text(json.dumps(others), encoding="utf-8")
    for name in ("one", "two"):
        add_servable(exported, root, name)
    first = (root / "one" / "openvino" / "openvino_model.bin").stat().st_ino
    with pytest.raises(OutputExists, match="--overwrite"):
        add_servable(exported, root, "one")
    add_servable(exported, root, "one", overwrite=True)
    assert (root / "one" / "openvino" / "openvino_model.bin").stat().st_ino != first
    config = json.loads((root / "config.json").read_text("utf-8"))
    added = [{"name": name, "base_path": name} for name in ("one", "two")]
    assert config == {**others, "mediapipe_config_list": [*others["mediapipe_config_list"], *added]}
    for name in ("resnet", "old"):
        with pytest.raises(UsageError, match="another entry has this name"):
            add_servable(exported, root, name)
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OutputExists, match="not made by sparseport"):
        add_servable(exported, root, "mine", overwrite=True)
    assert sorted(path.name for path in root.iterdir()) == ["config.json", "mine", "one", "two"]
    assert json.loads((root / "config.json").read_text("utf-8")) == config


def test_a_config_that_cannot_be_written_stays_as_it_was(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_servable(exported, tmp_path / "models", "one")
    before = (tmp_path / "models" / "config.json").read_bytes()
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "config.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(EnvironmentProblem, match="--overwrite"):
        patch.setattr(Path, "replace", refuse)
        add_servable(exported, tmp_path / "models", "two")
    assert (tmp_path / "models" / "config.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["config.json", "one", "two"]
    made = add_servable(exported, tmp_path / "models", "two", overwrite=True)
    assert served(made.config, "two").resolve() == made.model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "../up"}, UsageError, "--name"),
        ({"name": "config.json"}, UsageError, "--name"),
        ({"device": 'CPU" models_path: "/etc'}, UsageError, "--device"),
        ({"device": "GPU", "precision": "full"}, UsageError, "CPU only"),
        ({"precision": "half"}, UsageError, "--precision"),
        ({"cache_size": 0}, UsageError, "1 GB"),
    ],
)
def test_options_that_cannot_be_are_refused(
    exported: Path, tmp_path: Path, options: dict[str, Any], error: type[SparseportError], message: str
) -> None:
    with pytest.raises(error, match=message):
        add_servable(exported, tmp_path / "models", **{"name": "mine", **options})
    assert list(tmp_path.iterdir()) == []


def test_what_the_server_would_not_serve_is_refused(
    tiny_both: Any, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tiny_both[0].output
    with pytest.raises(UsageError, match=r"give .*openvino"):
        add_servable(both, tmp_path / "models", "mine")
    with pytest.raises(Unsupported, match="--target openvino"):
        add_servable(both / "onnx", tmp_path / "models", "mine")
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    with (changed / "openvino_model.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(VerificationError, match=r"openvino_model\.bin"):
        add_servable(changed, tmp_path / "models", "mine")
    body = Certificate.read(exported).body
    bare = Path(shutil.copytree(exported, tmp_path / "bare"))
    files = {name: facts for name, facts in body["files"].items() if "detokenizer" not in name}
    Certificate({**body, "files": files}).write(bare)
    with pytest.raises(Unsupported, match="--no-tokenizer"):
        add_servable(bare, tmp_path / "models", "mine")
    facts = next(iter(body["linears"].values()))
    branch = {"branch_sha256": "0", "readback": {"openvino": "0"}}
    Certificate({**body, "adapters": {next(iter(files)): {"q": {**facts, **branch}}}}).write(bare)
    with pytest.raises(Unsupported, match="--branches graph"):
        add_servable(bare, tmp_path / "models", "mine")
    assert not (tmp_path / "models").exists()
    (tmp_path / "models").mkdir()
    for text in ("[]", '{"mediapipe_config_list": {}}', '{"model_config_list": [{"config": []}]}', "{"):
        (tmp_path / "models" / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=r"config\.json"):
            add_servable(exported, tmp_path / "models", "mine")
        assert (tmp_path / "models" / "config.json").read_text("utf-8") == text
    assert cli.main(["ovms", str(tmp_path / "none"), "--output", str(tmp_path / "models"), "--name", "x"]) == 5
    assert "no certificate" in capsys.readouterr().err


def test_the_verb(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ovms", str(exported), "--output", str(tmp_path / "models"), "--name", "mine", "--quiet"]
    assert cli.main([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert verify(made["model"]).ok and made["linked"] is False
    assert cli.main(arguments) == 6
    assert cli.main([*arguments, "--overwrite", "--hard-links"]) == 0
    out = capsys.readouterr().out
    assert "hard-linked" in out and f"--config_path {made['config']}" in out
    # A server that watches a folder sees whole files only: nothing of ours is left beside them.
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["config.json", "mine"]
