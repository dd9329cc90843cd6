"""The table of conflicts: each rule applies where it has to, and not where one of its conditions does not hold."""

from __future__ import annotations

import pytest

from sparseport.doctor.conflicts import RULES, judge, packages_of
from sparseport.doctor.packages import canonical, read_tested

BY_NAME = {rule.name: rule for rule in RULES}
CPU = {"torch_cuda_without_gpu": "torch 2.13.0 for CUDA 13.0, no NVIDIA driver"}
# Rule -> an environment in which it applies; then environments that differ in one thing, and in which it does not.
CASES: dict[str, tuple[dict[str, str], list[dict[str, str]]]] = {
    "openvino-releases": (
        {"openvino": "2026.4.1", "openvino-tokenizers": "2026.3.0.0"},
        [
            {"openvino": "2026.4.1", "openvino-tokenizers": "2026.4.1.0", "openvino-genai": "2026.4.1.0"},
            {"openvino": "1"},
        ],
    ),
    "onnxruntime-twice": (
        {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"},
        [{"onnxruntime-gpu": "1.31.1"}, {"onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0"}],
    ),
    "onnxruntime-genai-twice": (
        {"onnxruntime-genai": "0.18.0", "onnxruntime-genai-cuda": "0.18.0"},
        [{"onnxruntime-genai": "0.18.0", "onnxruntime": "1.31.1"}],
    ),
    "onnxruntime-genai-runtime": (
        {"onnxruntime-genai": "0.18.0", "onnxruntime": "1.30.2"},
        [
            {"onnxruntime-genai": "0.18.0", "onnxruntime": "1.31.0"},
            {"onnxruntime-genai": "0.17.0", "onnxruntime": "1.30"},
        ],
    ),
    "optimum-intel-torchvision": (
        {"optimum-intel": "2.2.0"},
        [{"optimum-intel": "2.2.0", "torchvision": "0.28.0"}, {"optimum-intel": "2.1.0"}, {}],
    ),
    "optimum-intel-safetensors": (
        {"optimum-intel": "2.1.0", "safetensors": "0.8.0"},
        [{"optimum-intel": "2.1.0", "safetensors": "0.7.0"}, {"optimum-intel": "2.2.0", "safetensors": "0.8.0"}],
    ),
    "optimum-intel-transformers": (
        {"optimum-intel": "2.2.0", "transformers": "5.6.0"},
        [{"optimum-intel": "2.1.0", "transformers": "5.5.4"}, {"transformers": "5.6.0"}],
    ),
    "optimum-onnx-transformers": (
        {"optimum-onnx": "0.1.0", "transformers": "5.5.4"},
        [{"optimum-onnx": "0.1.0", "transformers": "4.57.6"}],
    ),
    "optimum-onnx-optimum-intel": (
        {"optimum-onnx": "0.1.0", "optimum-intel": "2.1.0"},
        [{"optimum-onnx": "0.1.0"}, {"optimum-intel": "2.1.0"}],
    ),
    "olive-model-builder": (
        {"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0"},
        [{"olive-ai": "0.13.0", "onnxruntime-genai": "0.14.1"}, {"onnxruntime-genai": "0.18.0"}],
    ),
    "nncf-numpy": ({"nncf": "3.4.0", "numpy": "2.5.0"}, [{"nncf": "3.4.0", "numpy": "2.4.6"}, {"numpy": "2.5.0"}]),
    "nncf-torchao": ({"nncf": "3.4.0"}, [{"nncf": "3.4.0", "torchao": "0.17.0"}, {"numpy": "2"}]),
}
FACTS = {
    "torch-cuda-without-gpu": "torch_cuda_without_gpu",
    "torch-cpu-with-gpu": "torch_cpu_with_gpu",
}


def names(versions: dict[str, str], facts: dict[str, str] | None = None) -> set[str]:
    return {problem.name for problem in judge(versions, facts or {}, read_tested())}


def test_every_rule_has_a_case() -> None:
    assert {*CASES, *FACTS} == set(BY_NAME)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_applies_where_it_has_to(name: str) -> None:
    broken, well = CASES[name]
    assert name in names(broken)
    for versions in well:
        assert name not in names(versions), versions


@pytest.mark.parametrize("name", FACTS)
def test_rules_about_facts(name: str) -> None:
    assert names({}, {FACTS[name]: "seen"}) == {name} and names({}) == set()


@pytest.mark.parametrize("name", BY_NAME)
def test_a_problem_says_what_was_found_and_the_way_out(name: str) -> None:
    versions = CASES[name][0] if name in CASES else {}
    facts = {FACTS[name]: "seen"} if name in FACTS else {}
    (problem,) = [one for one in judge(versions, facts, read_tested()) if one.name == name]
    for package, version in versions.items():
        assert f"{package} {version}" in problem.found
    assert "{" not in problem.fix and problem.fix != problem.what
    assert packages_of(BY_NAME[name]) == {canonical(one) for one in packages_of(BY_NAME[name])}


def test_the_tested_versions_are_free_of_conflicts() -> None:
    found = judge(read_tested(), {}, read_tested())
    assert [problem.name for problem in found if problem.level != "note"] == []


def test_a_version_of_ones_own_is_no_crash() -> None:
    versions = {"openvino": "built-here", "openvino-genai": "2026.4.1.0", "onnxruntime-genai": "main", "olive-ai": "x"}
    assert names(versions) == {"openvino-releases"}
