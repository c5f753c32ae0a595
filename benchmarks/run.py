"""Run every benchmark of this folder, one after the other: what `make bench` calls."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Return the number of benchmarks that failed."""
    failed = 0
    for module in sorted(Path(__file__).parent.glob("*.py")):
        if module.name == Path(__file__).name:
            continue
        print(f"== {module.stem}", flush=True)
        failed += subprocess.run([sys.executable, str(module)]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
