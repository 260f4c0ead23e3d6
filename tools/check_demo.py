"""Hold the demo to its promise: python tools/check_demo.py wemoe-demo/merged/results.json [MORE ...]

The merged model keeps at least 96 % of its experts' mean accuracy and beats its static merge by at least 8 points;
the base is middling (40 to 75 %) and every expert has at least 88 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def broken_promises(results: dict[str, dict[str, dict[str, float]]], kept: float) -> list[str]:
    """What the results fail to hold; empty if they hold everything."""
    mean = results["mean"]
    base, static, merged = (float(mean[column]) for column in ("base", "static", "merged"))  # type: ignore[arg-type]
    weakest = min(row["expert"] for row in results["tasks"].values())
    promises = {
        f"keeps {kept:.1%} of its experts' mean accuracy, promised 96 %": kept >= 0.96,
        f"beats its static merge by {100 * (merged - static):.1f} points, promised 8": merged - static >= 0.08,
        f"the base's mean is {base:.1%}, promised 40 to 75 %": 0.40 <= base <= 0.75,
        f"the weakest expert has {weakest:.1%}, promised 88 %": weakest >= 0.88,
    }
    return [promise for promise, holds in promises.items() if not holds]


def main() -> None:
    failed = False
    for path in sys.argv[1:]:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        broken = broken_promises(results, results["kept"])
        failed |= bool(broken)
        gain = 100 * (results["mean"]["merged"] - results["mean"]["static"])
        print(f"{path}: keeps {results['kept']:.1%}, {gain:+.1f} points against the static merge")
        for promise in broken:
            print(f"  broken: {promise}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
