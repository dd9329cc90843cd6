"""Certificates, bench files and the like, made up for the tests of pages and cards: small, and with known numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from nls.search.toy import OBJECTIVE_PAIR, evaluation_of, everything
from sparseport.nls.search.front import SearchResult, front_of, write_result
from sparseport.report.gather import Folder, Gathered, Place, looked_at
from sparseport.verify.certificate import Certificate

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64}
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 64)}
SHA = "ab" * 32


def layer(shape: tuple[int, int], target: str = "openvino", **more: Any) -> dict[str, Any]:
    """Facts of an INT4 layer of which a quarter is pruned, merged with rank 6."""
    return {
        "shape": list(shape),
        "rule": "qa_sparse_peft",
        "rank": 6,
        "stored": "u4 g32",
        "bits": 4,
        "group_size": 32,
        "pruned": shape[0] * shape[1] // 4,
        "revived": 0,
        "sparsity": "0.250000",
        "weight_sha256": SHA,
        "readback": {target: SHA},
        **more,
    }


def body(target: str = "openvino", linears: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A certificate's body with two blocks of three layers each, an embedding, and measured logits."""
    if linears is None:
        linears = {f"model.layers.{n}.{part}": layer(shape, target) for n in range(2) for part, shape in SHAPES.items()}
    weights = {name: facts["shape"][0] * facts["shape"][1] for name, facts in linears.items()}
    masked = sum(weights[name] for name, facts in linears.items() if "pruned" in facts)
    pruned = sum(facts.get("pruned", 0) for facts in linears.values())
    run = {"kl": "3.974e-11", "max_abs": "1.898e-04", "top1": "1.0000", "settings": {}}
    whole = {
        "schema": 1,
        "sparseport": "1.2.3",
        "target": target,
        "recipe": {"embedding": "fp16", "sub_adapter": "heuristic", "rounding": "sqft"},
        "inputs": {"base": {"config.json": "cd" * 32}, "adapter": {"adapter_model.safetensors": "ef" * 32}},
        "origin": {},
        "versions": {"numpy": "2.0"},
        "linears": linears,
        "tensors": {
            "model.embed_tokens.weight": {
                "shape": [64, 32],
                "readback": {target: SHA},
                "changed": 0,
                "source_dtype": "float16",
            }
        },
        "totals": {
            "linears": len(linears),
            "int4_linears": sum(facts.get("bits") == 4 for facts in linears.values()),
            "weights": sum(weights.values()),
            "masked_weights": masked,
            "pruned": pruned,
            "revived": sum(facts.get("revived", 0) for facts in linears.values()),
            "sparsity": f"{pruned / masked:.6f}" if masked else "0.000000",
        },
        "numerics": {
            "run": True,
            "tokens": 112,
            "full_precision": {
                **run,
                "judged_max_abs": "1.898e-04",
                "judged_against": "float32",
                "allowed": "1.000e-03",
            },
            "default": {**run, "kl": "1.090e-07", "max_abs": "1.210e-02", "top1": "0.9911"},
        },
        "files": {
            "config.json": {"sha256": "12" * 32, "size": 700},
            "tokenizer.json": {"sha256": "34" * 32, "size": 1000},
            "model.bin": {"sha256": "56" * 32, "size": 2 << 20},
        },
    }
    return {**copy.deepcopy(whole), **more}


def sub_network(target: str = "openvino") -> tuple[dict[str, Any], dict[str, Any]]:
    """Body and config of a sub-network: block 1 of 3 is gone, and block 0 has half its MLP."""
    linears = {
        "model.layers.0.self_attn.q_proj": layer((32, 32), target),
        "model.layers.0.mlp.down_proj": layer((32, 32), target, whole_shape=[32, 64]),
        "model.layers.1.self_attn.q_proj": layer((32, 32), target),
        "model.layers.1.mlp.down_proj": layer((32, 64), target),
    }
    linears["model.layers.1.self_attn.q_proj"]["from"] = "model.layers.2.self_attn.q_proj"
    own = {"blocks": [0, 2], "shapes": {"model.layers.0.mlp.down_proj": [32, 32]}, "whole": {"num_hidden_layers": 3}}
    return body(target, linears), {**CONFIG, "sparseport": own}


def fake_folder(place: Path, data: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Certificate:
    """A folder with nothing but a certificate and a config."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config or CONFIG), encoding="utf-8")
    certificate = Certificate(data or body())
    certificate.write(place)
    return certificate


def looked(
    place: Path, data: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **more: Any
) -> Folder:
    """A made-up folder as if it had been verified; `name` and `differences` may be given."""
    fake_folder(place, data, config)
    found = looked_at(Place(place, more.pop("name", place.name)), (3, 6, 1))
    return Folder(**{**vars(found), **more})


def no_certificate(name: str = "lost") -> Folder:
    """What is left of a folder without a certificate."""
    return Folder(name, ("sparseport.json: the folder has no certificate",))


def gathered(*folders: Folder, **more: Any) -> Gathered:
    """What a page is made of; all folders verify unless they say otherwise."""
    return Gathered("1.2.3", folders, tuple(more.pop("between", ())), **more)


def summary(median: float) -> dict[str, Any]:
    """A measured quantity, five percent around its median."""
    return {
        "median": median,
        "min": 0.95 * median,
        "max": 1.05 * median,
        "samples": [0.95 * median, median, 1.05 * median],
    }


def bench_row(label: str, seal: str | None = None, decode: float = 87.5, **more: Any) -> dict[str, Any]:
    """A row of a bench file."""
    return {
        "label": label,
        "model": "openvino",
        "engine": "openvino-genai",
        "device": "CPU",
        "settings": {"KV_CACHE_PRECISION": "u8"},
        "size_bytes": 123456789,
        "bytes_per_token": 90_000_000,
        "bytes_counted": "certificate",
        "decode_ms": summary(1000 / decode),
        "decode_tokens_s": summary(decode),
        "first_token_ms": summary(95.0),
        "prefill_tokens_s": summary(670.0),
        "load_s": summary(1.1),
        "peak_mib": summary(420.0),
        "energy_j": None,
        "ratio": {"decode": 1.0, "first_token": 1.0},
        "limit": {"tokens_s": 233.0, "reached": 0.375},
        "drift": {"kl": 0.0137, "top1": 0.9107, "max_abs": 2.4},
        "certificate_sha256": seal,
        **more,
    }


def bench(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A bench file's content."""
    return {
        "schema": 1,
        "kind": "sparseport-bench",
        "sparseport": "1.2.3",
        "machine": {
            "processor": "Some Processor",
            "cores": 2,
            "memory_gib": 15.6,
            "flags": ["avx2"],
            "system": "Linux",
            "python": "3.11.9",
            "versions": {"openvino": "2026.4.1"},
            "load_before": 0.25,
            "load_after": None,
            "bandwidth_gb_s": {"median": 21.0, "min": 20.2, "max": 21.4, "threads": 2},
        },
        "asked": {"prompt": 64, "tokens": 32, "rounds": 3, "warm_up": 1, "threads": 0, "pinned": None},
        "devices": [
            {"name": "CPU", "present": True, "full_name": "Some Processor"},
            {"name": "NPU", "present": False, "why": "no such device"},
        ],
        "missing": [{"engine": "llama.cpp", "why": "not installed", "fix": "pip install llama-cpp-python"}],
        "failed": [{"label": "broken", "engine": "torch", "why": "out of memory"}],
        "rows": list(rows),
        **more,
    }


def naive(**more: Any) -> dict[str, Any]:
    """A comparison of ways, in the form of benchmarks/results/fidelity.json."""
    exact = {"codes": 0.0, "zero_points": 0.0, "scales": 0.0, "revived": 0.0, "embedding": 0.0, "head": 0.0}
    other = {"codes": 0.0111, "zero_points": 0.0111, "scales": 0.0224, "revived": 0.0, "embedding": 0.98, "head": 0.98}
    return {
        "machine": {"cpu": "Some Processor", "cores": 2, "python": "3.11.7", "versions": {"nncf": "3.4.0"}},
        "items": 200,
        "rows": [
            {"path": "sparseport, OpenVINO", **exact, "kl": "3.748e-11", "max_abs": "1.960e-04", "top1": "1.0000"},
            {
                "path": "dequantise, optimum-cli INT4",
                **other,
                "kl": "1.662e-02",
                "max_abs": "2.500e+00",
                "top1": "0.9504",
                "accuracy": 0.915,
                "float32": {"kl": "1.500e-02", "max_abs": "2.000e+00", "top1": "0.9600"},
            },
        ],
        **more,
    }


def search_result(**more: Any) -> SearchResult:
    """All 72 sub-networks of the toy space, with the heuristic among the seeds."""
    candidates = everything()
    evaluations = tuple(evaluation_of(candidate) for candidate in candidates)
    front = front_of(evaluations, OBJECTIVE_PAIR)
    fields = {
        "strategy": {"name": "nsga2", "seed": 0},
        "space": "11" * 32,
        "evaluation": "22" * 32,
        "objectives": OBJECTIVE_PAIR,
        "evaluations": evaluations,
        "front": front,
        "seeds": {"minimal": (16, 16, 16, 0), "heuristic": (24, 24, 32, 1), "maximal": (32, 32, 64, 1)},
        "chosen": front[1],
        "reason": "the fewest MACs among those that are accurate enough",
        "journal_sha256": "33" * 32,
        "seconds": 12.5,
    }
    return SearchResult(**{**fields, **more})


def written(path: Path, content: dict[str, Any]) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def written_search(path: Path) -> Path:
    """A search's result as a file."""
    write_result(path, search_result())
    return path
