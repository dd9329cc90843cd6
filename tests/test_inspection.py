"""`sparseport inspect`: what a folder is, what an export keeps and loses, and commands that really work next."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from dialects import quantised_llama
from e2e.in_process import in_process
from gguf_files import tensors_of, write_gguf
from sparseport import cli
from sparseport.cli import main
from sparseport.errors import BadInput, SparseportError, Unsupported, VerificationError
from sparseport.inspection import inspect
from sparseport.verify.certificate import Certificate

EMBEDDING = "model.embed_tokens.weight"


def parsed(command: str) -> object:
    """The command as the command line reads it; a word that a shell would split or act on is found here."""
    words = shlex.split(command)
    assert words[0] == "sparseport"
    return cli._parser().parse_args(words[1:])


def with_embedding(folder: Path, out: Path, values: np.ndarray) -> Path:
    """A copy of a model folder with another embedding."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    tensors = {**load_file(out / "model.safetensors"), EMBEDDING: values}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_int4_base(tiny_int4: Path) -> None:
    found = inspect(tiny_int4)
    assert found.kind == "base" and found.title.startswith("llama model, GPTQ v1, mostly int4 g32 asym, 5")
    linears = [layer for layer in found.layers if layer.module != "lm_head"]
    assert len(linears) == 14
    for layer in linears:
        assert layer.format == "int4 g32 asym" and layer.scales == "float16" and layer.stored == "u4 g32"
        assert layer.zeros >= layer.weights // 2 and layer.pruned is None and not layer.act_order
        assert layer.zero_points is not None and 0 <= layer.zero_points[0] <= layer.zero_points[1] <= 15
    assert "codes, zero-points and scales of 14 layers, bit for bit" in found.keeps
    assert any("no mask comes with INT4 codes" in line for line in found.loses)
    assert found.next[0] == f"sparseport export --target openvino --base {tiny_int4} --output int4-openvino"


def test_sparse_base_and_its_pattern(tiny_sparse: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    found = inspect(tiny_sparse)
    layers = {layer.module: layer for layer in found.layers}
    layer = layers["model.layers.0.mlp.up_proj"]
    assert layer.zeros == layer.weights // 2 and layer.pattern == "" and layer.format == "float16"
    assert layers["lm_head"].stored == "with the embedding" and layers["lm_head"].zeros == 0
    assert "50.0% of the linear weights are exactly zero" in found.title

    copy = tmp_path / "two of four"
    shutil.copytree(tiny_sparse, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 2 and "layers" in name:
            tensors[name] = np.where(np.arange(values.shape[1]) % 4 < 2, values, 0).astype(values.dtype)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = inspect(copy)
    assert {layer.pattern for layer in found.layers if layer.module != "lm_head"} == {"2:4"}
    assert shlex.quote(str(copy)) in found.next[0]


def test_what_is_rounded_is_counted(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    embedding = load_file(tiny_base / "model.safetensors")[EMBEDDING].astype(np.float32)
    embedding[3, :5] = 1 + 2.0**-16
    copy = with_embedding(tiny_base, tmp_path / "wide", embedding)
    (copy / "tokenizer.json").unlink()
    found = inspect(copy)
    assert f"5 values of {EMBEDDING} are rounded to float16; --embedding fp32 keeps them" in found.loses
    assert "every value of lm_head.weight (the head travels with the embedding)" in found.keeps
    assert any("no tokenizer" in line for line in found.loses) and "--embedding" not in found.next[0]
    assert all(parsed(command).tokenizer is False for command in found.next)
    embedding[4, 4] = 70000
    found = inspect(with_embedding(tiny_base, tmp_path / "wider", embedding))
    assert f"1 values of {EMBEDDING} overflow float16: the export needs --embedding fp32" in found.loses
    assert all(parsed(command).embedding == "fp32" for command in found.next)


def test_only_layers_that_leave_as_layers_are_counted(tiny_base: Path, tmp_path: Path) -> None:
    """The head of a float32 base is rounded with the embedding: it is not among the layers that stay bit for bit."""
    import torch
    from safetensors.torch import load_file, save_file

    found = inspect(tiny_base)
    assert "values and zeros of 14 floating-point layers, bit for bit" in found.keeps and found.loses == []
    shutil.copytree(tiny_base, tmp_path / "base")
    state = {name: value.float() * 1.001 for name, value in load_file(tiny_base / "model.safetensors").items()}
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    found = inspect(tmp_path / "base")
    assert found.keeps == ["values and zeros of 14 floating-point layers, bit for bit"]
    head, embedding = (line.split(" values of ")[1] for line in found.loses)
    assert (
        head
        == "lm_head.weight (the head travels with the embedding) are rounded to float16; --embedding fp32 keeps them"
    )
    assert embedding == f"{EMBEDDING} are rounded to float16; --embedding fp32 keeps them"
    narrow = {name: value.to(torch.bfloat16) for name, value in state.items()}
    save_file(narrow, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert inspect(tmp_path / "base").keeps[0] == (
        "values and zeros of 14 floating-point layers, exactly (bfloat16 leaves as float32, which holds it)"
    )


def test_adapters(tiny_adapter: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    found = inspect(tiny_adapter)
    assert found.kind == "adapter" and found.title == "QA-SparsePEFT adapter for 10 layers"
    assert found.facts["scaling"] == "2" and found.facts["search space"] == "2 groups of rank [8, 6, 4]"
    assert len(found.next) == 3 and all("--sparse-base SPARSE-BASE" in command for command in found.next)
    found = inspect(tiny_adapter_sparse)
    assert found.title == "SparsePEFT adapter for 10 layers" and "--base SPARSE-BASE" in found.next[0]

    extracted = tmp_path / "extracted"
    shutil.copytree(tiny_adapter_sparse, extracted)
    (extracted / "elastic_adapter_config.json").unlink()
    config = json.loads((extracted / "adapter_config.json").read_text())
    (extracted / "adapter_config.json").write_text(json.dumps({**config, "r": 16, "lora_alpha": 32}))
    found = inspect(extracted)
    assert any("lower rank than r = 16" in line for line in found.warnings) and len(found.next) == 1


def test_third_party_samples(shared_dir: Path) -> None:
    found = inspect(shared_dir / "checkpoints" / "compressed-tensors-pack-asym-g64")
    assert found.writer == "compressed-tensors 0.19.0"
    assert {layer.format for layer in found.layers} == {"int4 g64 asym"}
    assert {layer.scales for layer in found.layers} == {"float32"}
    found = inspect(shared_dir / "checkpoints" / "gptq-v1-asym-g64-autoround")
    assert found.writer == "auto-round 0.16.1" and "GPTQ v1" in found.title
    found = inspect(shared_dir / "checkpoints" / "peft-lora-r8-smollm2")
    assert found.title == "LoRA adapter for 150 layers" and found.writer == "peft 0.21.2"


def test_a_dense_adapter_names_the_ways_to_keep_it(tiny_adapter_dense: Path, tiny_sparse: Path, capsys) -> None:
    found = inspect(tiny_adapter_dense)
    assert found.title == "LoRA adapter for 10 layers" and "--branches graph" in found.keeps[0]
    asked = [parsed(command) for command in found.next]
    assert [options.branches for options in asked] == [None, None, None, "graph", "adapter"]
    for command in found.next[3:]:
        words = [str(tiny_sparse) if word == "BASE" else word for word in shlex.split(command)[1:]]
        assert main([*words, "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["refused"] == 0
    assert parsed(inspect(tiny_sparse).next[-1]).branches == "graph"


def test_declared_pattern_is_compared(repo_root: Path, tmp_path: Path) -> None:
    sample = repo_root / "tests" / "data" / "samples" / "compressed-tensors-sparse-24-bitmask"
    found = inspect(sample)
    assert found.facts["declared sparsity"] == "2:4, kept by 7 of 7 layers"
    assert "the mask that is stored with the weights" in found.keeps
    assert all(layer.pruned == layer.weights // 2 for layer in found.layers if layer.module != "lm_head")
    other = tmp_path / "other"
    shutil.copytree(sample.parent / "compressed-tensors-sparse-bitmask", other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["sparsity_structure"] = "2:4"
    (other / "config.json").write_text(json.dumps(config))
    assert inspect(other).facts["declared sparsity"].startswith("2:4, kept by 0 of ")


def test_the_first_command_runs(tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A base that needs every option there is: no tokenizer, a pickle, a wrong label, a tensor beside the index."""
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    pickled, labelled = Path("M; RM -RF $HOME"), Path("-V 2")
    shutil.copytree(tiny_base, pickled)
    state = load_file(pickled / "model.safetensors")
    torch.save(state, pickled / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).unlink()

    quantised_llama(tiny_base, labelled, "gptq-v2")
    config = json.loads((labelled / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (labelled / "config.json").write_text(json.dumps(config))
    state = load_file(labelled / "model.safetensors")
    (labelled / "model.safetensors").unlink()
    save_file({**state, "left.over": state["model.norm.weight"].clone()}, labelled / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (labelled / "model.safetensors.index.json").write_text(json.dumps(index))

    cases = (
        (pickled, ["--allow-pickle"], "E_PICKLE"),
        (labelled, ["--gptq-zeros", "v2", "--ignore-extra"], "E_INDEX"),
    )
    for path, options, without in cases:
        given = f"./{path}"
        assert main(["inspect", given, "--quiet", "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["error"]["code"] == without
        assert main(["inspect", given, "--quiet", *options]) == 0
        commands = [line[7:] for line in capsys.readouterr().out.splitlines() if line.startswith("next:  ")]
        for command in commands:
            arguments = parsed(command)
            assert (arguments.allow_pickle is True) == ("--allow-pickle" in options)
            assert arguments.gptq_zeros == ("v2" if "v2" in options else None)
            assert (arguments.ignore_extra is True) == ("--ignore-extra" in options)
            assert (arguments.tokenizer is False) == (path == pickled)
        with in_process():
            assert main([*shlex.split(commands[0])[1:], "--no-numerics", "--quiet"]) == 0, capsys.readouterr().err
        assert Path(f"{path}-openvino", "openvino_model.bin").is_file()
        capsys.readouterr()


def test_the_commands_of_an_adapter_run(tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path, capsys) -> None:
    import torch
    from safetensors.torch import load_file

    adapter = tmp_path / "BASE"  # the name of a placeholder is a name like any other
    shutil.copytree(tiny_adapter_sparse, adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = inspect(adapter, allow_pickle=True)
    assert len(found.next) == 3
    assert all(parsed(command).allow_pickle is True for command in found.next)
    words = [str(tiny_sparse) if word == "SPARSE-BASE" else word for word in shlex.split(found.next[1])[1:]]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"] == 0


@pytest.mark.parametrize("name", ["A", "a b", "-x", "it's", "$(x)", "[red]", ":smile:", "\\[b]\\", "-"])
def test_printed_paths_stay_what_they_are(name: str, tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(tiny_base, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", f"./{name}", "--quiet"]) == 0
    command = next(line[7:] for line in capsys.readouterr().out.splitlines() if line.startswith("next:  "))
    assert Path(parsed(command).base) == Path(name)
    assert Path(parsed(command).output) == Path(f"{name}-openvino")
    monkeypatch.chdir(tmp_path / name)
    assert Path(parsed(inspect(Path()).next[0]).output) == Path(f"{name}-openvino")


def test_options_that_have_nothing_to_do_are_named(tiny_adapter: Path, tiny_base: Path) -> None:
    found = inspect(tiny_adapter, gptq_zeros="v1", ignore_extra=True)
    assert sum("has nothing to do" in line for line in found.warnings) == 2
    assert any("--gptq-zeros has nothing to do" in line for line in inspect(tiny_base, gptq_zeros="v1").warnings)


def test_a_refused_base_gets_no_command(tiny_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(group_size: int, columns: int, where: str) -> int:
        raise Unsupported("no such groups", where=where, fix="quantise again")

    monkeypatch.setattr("sparseport.stored_forms.openvino_layout", refuse)
    found = inspect(tiny_int4)
    assert found.next == [] and sum("is refused: " in line for line in found.loses) == 14
    assert not any("14 layers" in line for line in found.keeps)


@pytest.mark.parametrize("named", [[1], "LlamaForCausalLM", {"a": 1}, [None, "LlamaForCausalLM"], 5])
def test_junk_in_the_config_is_no_crash(named: object, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": named}))
    expected = "LlamaForCausalLM" if isinstance(named, list) and len(named) == 2 else "llama"
    assert inspect(tmp_path / "base").facts["architecture"] == expected


@pytest.mark.parametrize("totals", [{}, {"linears": "x"}, [], None])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_resealed_certificate_is_no_crash(verb: str, totals: object, tmp_path: Path, capsys) -> None:
    files = {"a.bin": {"size": 3, "sha256": "cd"}}
    body = {"schema": 1, "sparseport": "1.0", "linears": {}, "tensors": {}, "files": files, "totals": totals}
    Certificate(body).write(tmp_path)
    assert main([verb, str(tmp_path), "--quiet"]) == 5
    assert capsys.readouterr().err.startswith("error[E_VERIFY]: the certificate's entry is incomplete")
    read_back = {"linears": {"q": {"shape": [2, 4], "readback": 1}}}
    Certificate({**body, **read_back}).write(tmp_path)
    with pytest.raises(VerificationError, match="linears, q"):
        inspect(tmp_path)


def test_a_gguf_file(tmp_path: Path, capsys) -> None:
    write_gguf(tmp_path / "WIDE.gguf", stored={"blk.0.ffn_up.weight": "Q4_1"})
    found = inspect(tmp_path / "WIDE.gguf")
    assert found.keeps == [
        "the value of every tensor as the file gives it, but only with --gguf-dtype float32 --embedding fp32"
    ]
    assert any("norms and embedding too, is rounded to float16 once; an export counts" in line for line in found.loses)
    assert any("the blocks themselves" in line for line in found.loses)
    plain, wide = (parsed(command) for command in found.next)
    assert plain.gguf_dtype is None and plain.output == "WIDE-openvino"
    assert wide.gguf_dtype == "float32" and wide.embedding == "fp32"
    with in_process():
        assert main([*shlex.split(found.next[1])[1:], "--dry-run", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["stored"]["openvino"] for layer in layers} == {"f32"}

    model = write_gguf(tmp_path / "floats.gguf")
    assert not any("blocks" in line for line in inspect(tmp_path / "floats.gguf").loses)
    write_gguf(tmp_path / "narrow.gguf", stored=dict.fromkeys(tensors_of(model), "F16"))
    found = inspect(tmp_path / "narrow.gguf")
    assert found.keeps == ["the value of every tensor: all are float16 in the file"]
    assert found.loses == [] and len(found.next) == 1

    write_gguf(tmp_path / "other.gguf", settings={"tokenizer.ggml.model": "llama"})
    found = inspect(tmp_path / "other.gguf")
    assert found.next == [] and any("refuses this file" in line and "tokenizer" in line for line in found.loses)


def test_the_command_line(tiny_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_int4), "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "base" and len(data["layers"]) == 15
    assert main(["inspect", str(tiny_int4), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "int4 g32 asym" in text and "next:  sparseport export" in text
    assert main(["inspect", str(tiny_int4), "--quiet", "--layers"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing"), "--quiet"]) == 3
    assert "nothing to inspect here" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(tmp_path: Path, tiny_int4: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"):
        inspect(tmp_path)
    copy = tmp_path / "eight bits"
    shutil.copytree(tiny_int4, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= {"bits": 8}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="4-bit"):
        inspect(copy)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SparseportError, match="GGUF"):
        inspect(tmp_path / "x.gguf")
