"""Export from Python: look at the plan, export, and ask the finished folder in OpenVINO GenAI.

    python examples/export_and_ask.py --base INT4_DIR --sparse-base SPARSE_DIR --adapter ADAPTER_DIR --output OUT_DIR \
        --question "Dim the kitchen lights to 40 percent."

Needs `pip install 'sparseport[openvino]'`.
"""

from __future__ import annotations

import argparse

from sparseport import Progress, export, make_recipe, plan_export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--sparse-base")
    parser.add_argument("--adapter")
    parser.add_argument("--sub-adapter", default="maximal")
    parser.add_argument("--output", required=True)
    parser.add_argument("--question", default="Dim the kitchen lights to 40 percent.")
    options = parser.parse_args()

    # A recipe has the fields of the command line's options; what is left out has its default.
    recipe = make_recipe(
        {
            "base": options.base,
            "sparse_base": options.sparse_base,
            "adapter": options.adapter,
            "sub_adapter": options.sub_adapter,
            "output": options.output,
            "target": ["openvino"],
        }
    )
    plan = plan_export(recipe)  # reads headers, merges nothing
    for layer in plan.refusals:
        print(f"{layer.module}: {layer.refused}")
    print(f"{len(plan.layers)} linear layers, {plan.output_bytes >> 20} MiB, peak memory {plan.memory_mib} MiB")

    result = export(recipe, Progress())  # raises, and writes nothing, if anything cannot be proven
    totals = result.certificate.totals
    print(f"{totals['pruned']:,} of {totals['masked_weights']:,} weights are pruned, {totals['revived']} not zero")

    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(result.folder), "CPU")
    print(pipeline.generate(options.question, max_new_tokens=16))


if __name__ == "__main__":
    main()
