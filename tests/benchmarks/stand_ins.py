"""Run every recipe that names a model to its end, on a tiny stand-in of that model and its data; a line a recipe.

    python tests/benchmarks/stand_ins.py

The suite does so for one recipe an architecture (`tests/recipes/test_stand_ins.py`).
"""

import sys
import tempfile
import time
from pathlib import Path

from tests.command import rlhf
from tests.recipes.stand_ins import MODELS, RECIPES, ROOT, StandIns, named, small


def main() -> None:
    """Print recipe, exit code and seconds; end with 1 where one fails."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = StandIns(Path(folder))
        for name in RECIPES:
            verb = "run" if MODELS[str(named(name).backbone.model)].ends else "reward"
            overrides = [*stand_ins.overrides(name), *small(name)]
            begin = time.monotonic()
            result = rlhf(verb, str(ROOT / name), *overrides, "--out", Path(name).stem, cwd=Path(folder))
            print(f"{name}: exit code {result.returncode}, {time.monotonic() - begin:.0f} s", flush=True)
            if result.returncode:
                failed.append(name)
                print(result.stdout + result.stderr, file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
