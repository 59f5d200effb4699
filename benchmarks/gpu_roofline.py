"""Writes docs/roofline.md: floors of decode attention, and what plain XLA moves beside them.

    make gpu-roofline

Needs no GPU: compiles the XLA path for one that is not there.
"""

import json
import sys
from pathlib import Path

from benchmarks.gpu.fallback import fallback_bytes
from benchmarks.gpu.roofline import COMPILED, LEVELS, SHAPES, roofline_page
from benchmarks.gpu.target import NAMES, load_target

DOCS = Path(__file__).parents[1] / "docs"
COMPILED_FOR = "h100"


def main() -> int:
    """Compiles and writes."""
    target = load_target(COMPILED_FOR)
    sequences, tokens = COMPILED
    compiled = {
        shape.name: {
            level: fallback_bytes(shape, level, target, sequences=sequences, tokens=tokens)
            for level in LEVELS
        }
        for shape in SHAPES
    }
    DOCS.mkdir(exist_ok=True)
    (DOCS / "roofline.json").write_text(json.dumps(compiled, indent=1) + "\n")
    page = roofline_page([load_target(name) for name in NAMES], compiled, COMPILED_FOR)
    (DOCS / "roofline.md").write_text(page)
    print(f"wrote {DOCS / 'roofline.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
