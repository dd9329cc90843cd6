"""A certified folder as a checkpoint in float32; a process of its own, which holds the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_checkpoint(folder: str, output: str) -> dict[str, Any]:
    """Write the model with the weights that stand in a folder's files, and its tokenizer."""
    from sparseport.targets.read_back import open_reader
    from sparseport.verify.certificate import Certificate
    from sparseport.verify.numerics import reference_of

    source, target = Path(folder), Path(output)
    model = reference_of(source, open_reader(Certificate.read(source).target, source))
    model.save_pretrained(target)
    for name in (*_TOKENIZER, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return {"parameters": sum(value.numel() for value in model.parameters())}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(write_checkpoint)
