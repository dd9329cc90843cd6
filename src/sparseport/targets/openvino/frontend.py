"""The heavy half of an OpenVINO export, run as a child process: IR skeleton, tokenizer and detokenizer.

It needs torch, transformers and optimum-intel, but none of the model's matrices, so it runs beside the merge.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def build_frontend(config: str, small_tensors: str, output: str, tokenizer: str | None) -> dict[str, Any]:
    """Write the skeleton IR into `output` and, if `tokenizer` names a folder, the tokenizer models.

    Args:
        config: path of the model's config.json.
        small_tensors: safetensors file with every tensor of fewer than two dimensions.
        output: folder to write into.
        tokenizer: folder of the Hugging Face tokenizer, or None.

    Returns:
        The fields of `Skeleton`, and the versions of the packages that made the graph.
    """
    from importlib.metadata import version

    from sparseport.checkpoints.safetensors import SafeTensorsFile
    from sparseport.targets.empty_model import quiet
    from sparseport.targets.openvino.skeleton import build_skeleton
    from sparseport.targets.openvino.tokenizer import convert_tokenizer_folder
    from sparseport.targets.openvino.trace import lean_imports

    with quiet(), lean_imports():
        with SafeTensorsFile.open(Path(small_tensors)) as tensors:
            skeleton = build_skeleton(Path(config), Path(output), small_tensors=tensors.read)
        if tokenizer is not None:
            convert_tokenizer_folder(Path(tokenizer), Path(output))
    packages = ("torch", "transformers", "optimum", "optimum-intel", "openvino", "openvino-tokenizers")
    return {**asdict(skeleton), "versions": {name: version(name) for name in packages}}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(build_frontend)
