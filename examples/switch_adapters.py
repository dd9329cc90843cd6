"""Export a base with an un-merged adapter, add a second one, and switch between them while the pipeline runs.

    python examples/switch_adapters.py --base SPARSE_OR_INT4_DIR --adapter ADAPTER_DIR --second OTHER_ADAPTER_DIR \
        --output OUT_DIR --prompt "Dim the lights."

Needs `pip install 'sparseport[openvino]'`.
"""

from __future__ import annotations

import argparse

from sparseport import Progress, add_adapter, export, make_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "second", "output", "prompt"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    recipe = {
        "base": options.base,
        "adapter": options.adapter,
        "branches": "adapter",  # the base is written as it is, the adapter into a file beside it
        "output": options.output,
    }
    folder = export(make_recipe(recipe), Progress()).folder
    certificates = add_adapter(folder, options.second, "second", progress=Progress())
    for file, branches in certificates[0].adapters.items():
        print(f"{file}: {len(branches)} layers, proven")

    import openvino_genai as genai

    first = genai.Adapter(str(folder / "adapter.safetensors"))
    second = genai.Adapter(str(folder / "second.safetensors"))
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # the cache does not know which adapter its entries came from
    both = genai.AdapterConfig([first, second])
    pipeline = genai.LLMPipeline(str(folder), "CPU", adapters=both, scheduler_config=scheduler)
    for label, active in (
        ("first", genai.AdapterConfig(first)),
        ("second", genai.AdapterConfig(second)),
        ("base alone", genai.AdapterConfig()),
    ):
        print(f"{label}: {pipeline.generate(options.prompt, max_new_tokens=16, adapters=active)}")


if __name__ == "__main__":
    main()
