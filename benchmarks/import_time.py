"""How much longer does `import came_optax` take than `import optax`?

Both are timed in one fresh interpreter, optax first, so that the second number is
what the library adds; the median over interpreters is reported. With --budget-ms the
exit code says whether the library keeps to it.

    python benchmarks/import_time.py --budget-ms 50
"""

import argparse
import statistics
import subprocess
import sys

# A full garbage collection after importing jax takes tens of milliseconds and falls due
# within a few hundred allocations of the end of optax's import: whoever is imported
# next pays for it, so it is kept out of the comparison.
PROBE = """
import gc; gc.disable()
import time
start = time.perf_counter(); import optax
middle = time.perf_counter(); import came_optax
print(middle - start, time.perf_counter() - middle)
"""


def time_imports() -> tuple[float, float]:
    """Returns the seconds that optax takes and those that came_optax adds."""
    command = [sys.executable, "-I", "-c", PROBE]  # -I: the installed package only
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    optax_s, extra_s = map(float, done.stdout.split())
    return optax_s, extra_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--budget-ms", type=float, metavar="MS")
    args = parser.parse_args()

    time_imports()  # the first interpreter reads the disk and writes bytecode
    optax_s, extra_s = zip(*(time_imports() for _ in range(args.repeats)), strict=True)
    added = 1e3 * statistics.median(extra_s)
    print(f"optax {1e3 * statistics.median(optax_s):.1f} ms, came_optax {added:.1f} ms")
    if args.budget_ms is not None and added > args.budget_ms:
        sys.exit(f"import came_optax adds more than {args.budget_ms:g} ms")


if __name__ == "__main__":
    main()
