"""Every format goes all the way: read, exported, read back from the OpenVINO folder, verified, run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import DIALECTS, quantised_llama
from e2e.both import Exported, export_to_both
from e2e.formats import VERIFIED, Line, documented, drop_unnamed, named, settle, shown
from e2e.in_process import in_process
from e2e.tables import WRITE
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.targets.openvino import readback
from sparseport.weights.digest import digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import keeps_n_m
from sparseport.weights.rounding import dequantize

Inputs = dict[str, Any]
Weights = dict[str, QuantizedWeight | DenseWeight]
SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples"
OURS = "this repository"


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


@pytest.fixture
def through(tmp_path: Path) -> Callable[..., tuple[Exported, Weights]]:
    """Export, verify, and give back what stands in the written graph."""

    def run(**inputs: Any) -> tuple[Exported, Weights]:
        result = export_to_both(tmp_path, **inputs)
        model = readback.read_model(result.folder / "openvino_model.xml")
        return result, {item.name.removesuffix(".weight"): item.weight for item in readback.weights(model)}

    return run


def _stored(result: Exported) -> str:
    return ", ".join(sorted({facts["stored"] for facts in result.certificate.linears.values()}))


def _require_same(want: Weights, result: Exported) -> None:
    linears = result.certificate.linears
    assert set(linears) == set(want)
    for module, weight in want.items():
        assert linears[module]["readback"]["openvino"] == digest(weight), module


def _real(weight: QuantizedWeight | DenseWeight) -> np.ndarray:
    return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values.astype(np.float32)


# --- ways to store linear layers -------------------------------------------------------------------------------------

NAMES = {
    "dense": "dense safetensors",
    "gptq-v1": "GPTQ v1, asymmetric",
    "gptq-v2": "GPTQ v2, asymmetric",
    "gptq-act-order": "GPTQ v1, act-order",
    "gptq-channel": "GPTQ v1, group -1",
    "auto-round-gptq": "AutoRound auto_round:auto_gptq",
    "auto-round": "AutoRound auto_round",
    "auto-round-awq": "AutoRound auto_round:auto_awq",
    "awq-gemm": "AWQ gemm",
    "awq-gemv": "AWQ gemv",
    "ct-pack-asym": "compressed-tensors pack-quantized, asymmetric",
    "ct-pack-sym": "compressed-tensors pack-quantized, symmetric",
    "ct-pack-channel": "compressed-tensors pack-quantized, per channel",
    "ct-pack-group-order": "compressed-tensors pack-quantized, actorder group",
    "ct-pack-int8-zeros": "compressed-tensors pack-quantized, int8 zero-points",
    "sparse-bitmask": "compressed-tensors sparse-bitmask",
    "sparse-24-bitmask": "compressed-tensors sparse-24-bitmask",
}


def test_every_dialect_has_a_name() -> None:
    assert set(NAMES) == set(DIALECTS)


@shown(dialect=NAMES)
def test_dialect(dialect: str, tiny_base: Path, tmp_path: Path, through: Any) -> None:
    want = quantised_llama(tiny_base, tmp_path / "base", dialect)
    result, found = through(base=tmp_path / "base")
    _require_same(want, result)
    what = "values" if isinstance(next(iter(want.values())), DenseWeight) else "codes, zero-points, scales"
    if any(isinstance(weight, QuantizedWeight) and weight.input_order is not None for weight in want.values()):
        what += ", order"
    for module, weight in want.items():
        if weight.mask is not None:
            what = "values, mask"
            assert result.certificate.linears[module]["pruned"] == int(weight.mask.size - weight.mask.sum())
        assert np.array_equal(_real(found[module]), _real(weight))
    settle(Line(NAMES[dialect], OURS, "-", f"{len(want)} layers", f"{what}: equal", _stored(result)))


@shown("GPTQ v1, act-order, groups of 4")
def test_groups_that_openvino_cannot_compute(tiny_base: Path, tmp_path: Path, through: Any) -> None:
    want = quantised_llama(tiny_base, tmp_path / "base", "gptq-act-order", group_size=4)
    result, _ = through(base=tmp_path / "base")
    _require_same(want, result)
    settle(
        Line(
            "GPTQ v1, act-order, groups of 4",
            OURS,
            "-",
            f"{len(want)} layers",
            "codes, zero-points, scales, order: equal",
            f"{_stored(result)}, filled up with zeros",
        )
    )


# --- files of the tools themselves -----------------------------------------------------------------------------------


BUNDLED = {
    "auto-round-asym-g32": "AutoRound auto_round:auto_awq (AWQ gemm)",
    "auto-round-asym-g32-mixed": "AutoRound auto_round:auto_awq (AWQ gemm)",
    "auto-round-awq-asym-g32": "AWQ gemm",
    "auto-round-gptq-asym-g32": "GPTQ v1",
    "auto-round-gptq-asym-g32-mixed": "GPTQ v1",
    "auto-round-sym-g32": "AutoRound auto_round:auto_gptq (GPTQ v1)",
    "autoawq-gemm-asym-g32": "AWQ gemm",
    "autoawq-gemv-asym-g64": "AWQ gemv",
    "compressed-tensors-pack-asym-channel-odd": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-asym-g12-odd": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-asym-g32": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-asym-g32-actorder-group": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-asym-g32-actorder-weight": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-mixed": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-sym-channel": "compressed-tensors pack-quantized",
    "compressed-tensors-pack-sym-g32": "compressed-tensors pack-quantized",
    "compressed-tensors-sparse-24-bitmask": "compressed-tensors sparse-24-bitmask",
    "compressed-tensors-sparse-bitmask": "compressed-tensors sparse-bitmask",
    "compressed-tensors-sparse-bitmask-odd": "compressed-tensors sparse-bitmask",
    "gptqmodel-v1-asym-channel": "GPTQ v1",
    "gptqmodel-v1-asym-g32-actorder": "GPTQ v1 act-order",
    "gptqmodel-v2-asym-g32": "GPTQ v2",
    "gptqmodel-v2-sym-g32": "GPTQ v2",
}
SHARED = {
    "compressed-tensors-pack-asym-g64": "compressed-tensors pack-quantized",
    "gptq-v1-asym-g64-autoround": "GPTQ v1",
}


def _lines_of(samples: dict[str, str]) -> dict[str, str]:
    return {sample: f"{layout} (`{sample}`)" for sample, layout in samples.items()}


def test_every_sample_is_tested() -> None:
    assert {path.parent.name for path in SAMPLES.glob("*/expected.json")} == set(BUNDLED)
    assert {path.stem.removeprefix("shared-") for path in SAMPLES.glob("shared-*.json")} == set(SHARED)


@shown(sample=_lines_of(BUNDLED))
def test_sample(sample: str, through: Any) -> None:
    _require_sample(sample, BUNDLED[sample], SAMPLES / sample, SAMPLES / sample / "expected.json", through)


@shown(sample=_lines_of(SHARED))
def test_shared_sample(sample: str, shared_dir: Path, through: Any) -> None:
    folder, expectation = shared_dir / "checkpoints" / sample, SAMPLES / f"shared-{sample}.json"
    _require_sample(sample, SHARED[sample], folder, expectation, through)


def _require_sample(sample: str, layout: str, folder: Path, expectation: Path, through: Any) -> None:
    """What the written graph holds, dequantised, is what the tool itself dequantises to."""
    expected = json.loads(expectation.read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # GroupQueryAttention of ONNX Runtime takes multiples of 8 only.
    form = "qdq" if head_size % 8 else "nbits"
    result, found = through(base=folder, embedding="fp32", onnx={"format": form})
    for module, facts in expected["layers"].items():
        real = _real(found[module])
        assert list(real.shape) == facts["shape"]
        # Tools that compute in float16 round the product once more; where they can be asked for float32, both count.
        assert _sha256(real.astype(np.dtype(facts["dtype"]))) == facts["sha256"], module
        if "float32_sha256" in facts:
            assert _sha256(real) == facts["float32_sha256"], module
    with ModelFolder.open(folder) as opened:
        packed = open_linears(opened).packed
        assert packed is not None and packed.name == layout
    kinds = Counter(facts["source"] for facts in result.certificate.linears.values())
    settle(
        Line(
            f"{layout} (`{sample}`)",
            expected["tool"],
            expected["version"],
            ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()),
            f"0 ULP against {expected['tool']} in {len(expected['layers'])} layers",
            _stored(result),
        )
    )


def _sha256(values: np.ndarray) -> str:
    zeros_are_positive = values.astype("<f4") + np.float32(0)
    return hashlib.sha256(np.ascontiguousarray(zeros_are_positive).tobytes()).hexdigest()


# --- folders and adapters --------------------------------------------------------------------------------------------


@shown("GPTQ v1 with biases (Qwen2)")
def test_biases_of_quantised_layers(tmp_path: Path, through: Any) -> None:
    """q, k and v have biases beside their codes: they arrive, and the logits need them."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    torch.nn.init.normal_(parameter)
    model.half().save_pretrained(tmp_path / "dense")
    want = quantised_llama(tmp_path / "dense", tmp_path / "base", "gptq-v1")
    result, found = through(base=tmp_path / "base")
    _require_same(want, result)
    biases = {name: value for name, value in model.state_dict().items() if name.endswith(".bias")}
    assert len(biases) == 6
    for name, value in biases.items():
        assert np.array_equal(_real(found[name]).reshape(-1), value.float().numpy()), name
    settle(
        Line(
            "GPTQ v1 with biases (Qwen2)",
            OURS,
            "-",
            f"{len(want)} layers",
            "codes, zero-points, scales, biases: equal",
            _stored(result),
        )
    )


@shown("2:4 sparse base")
def test_two_of_four(tiny_base: Path, tmp_path: Path, through: Any) -> None:
    from sparseport.nls.artifacts import write_sparse_base

    with ModelFolder.open(tiny_base) as base:
        masks = {}
        for module in base.linear_names():
            if module != base.head_name:
                size = np.abs(base.read(f"{module}.weight").astype(np.float32)).reshape(-1, 4)
                kept = np.argsort(np.argsort(size, axis=1), axis=1) >= 2
                masks[module] = kept.reshape(base.info(f"{module}.weight").shape)
        write_sparse_base(base, masks, tmp_path / "base")
    result, found = through(base=tmp_path / "base")
    for module, mask in masks.items():
        assert keeps_n_m(_real(found[module]) != 0, 2, 4) and not _real(found[module])[~mask].any()
    pruned = result.certificate.totals["pruned"]
    exact = f"{pruned:,} pruned weights: all zero, two of every four"
    settle(Line("2:4 sparse base", OURS, "-", f"{len(masks)} layers", exact, _stored(result)))


@shown("dense safetensors in shards, tied head")
def test_sharded_and_tied(tiny_base: Path, tmp_path: Path, through: Any) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(tiny_base)
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, config=config, dtype="auto")
    model.tie_weights()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 2
    result, found = through(base=tmp_path / "base")
    state = model.state_dict()
    for module in result.certificate.linears:
        assert np.array_equal(_real(found[module]), state[f"{module}.weight"].float().numpy())
    exact = "values: equal"
    version = transformers.__version__
    settle(Line("dense safetensors in shards, tied head", "transformers", version, "14 layers", exact, "f16"))


@shown("pytorch_model.bin (`--allow-pickle`)")
def test_pickled_model(tiny_base: Path, tmp_path: Path, through: Any) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(tiny_base, tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    result, found = through(base=tmp_path / "base", allow_pickle=True)
    for module in result.certificate.linears:
        assert np.array_equal(_real(found[module]), state[f"{module}.weight"].float().numpy())
    version = torch.__version__.partition("+")[0]
    settle(Line("pytorch_model.bin (`--allow-pickle`)", "torch", version, "14 layers", "values: equal", "f16"))


@shown("unstructured sparse base")
def test_sparse_base(tiny_sparse: Path, through: Any) -> None:
    result, _ = through(base=tiny_sparse)
    totals = result.certificate.totals
    assert totals["revived"] == 0 and totals["pruned"] * 2 == totals["masked_weights"]
    exact = f"{totals['pruned']:,} pruned weights: all zero"
    settle(Line("unstructured sparse base", OURS, "-", "14 layers", exact, _stored(result)))


# --- the document ----------------------------------------------------------------------------------------------------


def test_every_line_has_its_test_and_every_test_its_line() -> None:
    """Those that did not run today among them (no data folder, no real model, `-k`)."""
    if WRITE:
        drop_unnamed()
        pytest.skip("the lines are written by the tests that settle them; run again without writing to compare")
    for table in ("read", "refused"):
        in_document, in_tests = {cells[0] for cells in documented(table)}, named(table)
        assert in_document - in_tests == set(), "lines that no test makes: `make formats` drops them"
        assert in_tests - in_document == set(), "lines that are missing: `make formats` writes them"


def test_a_test_settles_the_line_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from e2e import formats

    monkeypatch.setattr(formats, "_named", {"read": {}, "refused": {}})

    @shown("one")
    def test_forgets() -> None:
        pass

    with pytest.raises(AssertionError, match=r"names \['one'\] and settles \[\]"):
        test_forgets()
    with pytest.raises(AssertionError, match="name the line 'other'"):
        settle(Line("other", OURS, "-", "", "", ""))
    with pytest.raises(AssertionError, match="both name the line 'one'"):

        @shown(case={"a": "one"})
        def test_takes_it_again(case: str) -> None:
            pass


def test_the_tables_have_no_gaps() -> None:
    """Every format is read, exact, exported and verified, or refused with a way out; none is in both tables."""
    read, refused = documented("read"), documented("refused")
    for cells in read:
        assert len(cells) == 7 and all(cells), cells
        assert cells[6] == VERIFIED and any(word in cells[4] for word in ("equal", "0 ULP", "zero", "within")), cells
    for cells in refused:
        assert len(cells) == 4 and all(cells), cells
    assert len({cells[0] for cells in read}) == len(read) > 20
    assert len({cells[0] for cells in refused}) == len(refused) > 20
    assert not {cells[0] for cells in read} & {cells[0] for cells in refused}
