"""Find the fastest runtime settings on this machine among those that stay within a budget of drift.

    python examples/sweep_settings.py OUT_DIR/openvino OUT_DIR/onnx --kl 0.02 --top1 0.95

Each setting is measured together with its drift: the KL divergence of its logits from the dequantised model's.
`--write` puts the settings into the folders, with what was measured, and seals their certificates anew.
"""

from __future__ import annotations

import argparse

from sparseport import Asked, Budget, Progress, sweep_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--kl", type=float, default=0.02, help="mean KL divergence in nats, at most")
    parser.add_argument("--top1", type=float, default=0.95, help="share of equal most likely tokens, at least")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to read, and to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()

    result = sweep_folders(
        options.folders,
        Budget(options.kl, options.top1),
        asked=Asked(prompt=options.tokens, tokens=options.tokens, rounds=options.rounds),
        write=options.write,
        progress=Progress(),
    )
    for row in result["rows"]:
        decode, drift = row["decode_ms"], row["drift"]
        print(
            f"{row['label']:40} {decode['median']:7.2f} ms/token [{decode['min']:.2f}-{decode['max']:.2f}], "
            f"KL {drift['kl']:.1e}, top-1 {drift['top1']:.1%}"
        )
    for swept in result["sweeps"]:
        print(f"{swept['model']}: {len(swept['tried'])} settings tried, best {swept['settings'] or 'its own'}")
    print(f"fastest within the budget: {result['chosen']}")


if __name__ == "__main__":
    main()
