"""Does a model type's class make the kept blocks of the sub-network what they are in the whole model?

config.json need not say what is a default of the class, such as every other block of Gemma 2 having a window. Run as a
child process before an export that leaves blocks out, because it loads transformers.
"""

from __future__ import annotations

from typing import Any

from sparseport.checkpoints.block_settings import require_same_blocks
from sparseport.targets.empty_model import config_of


def compare_blocks(whole: dict[str, Any], cut: dict[str, Any], blocks: list[int]) -> dict[str, Any]:
    """Compare what the class makes of both configs, block by block.

    Args:
        whole: config.json of the whole model.
        cut: that of the sub-network.
        blocks: numbers of the kept blocks in the whole model.

    Returns:
        Nothing; what is wrong is raised.

    Raises:
        BadInput, Unsupported: see `config_of` and `require_same_blocks`.
    """
    filled = [config_of(settings, "config.json").to_dict() for settings in (whole, cut)]
    require_same_blocks(filled[0], filled[1], tuple(blocks))
    return {}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(compare_blocks)
