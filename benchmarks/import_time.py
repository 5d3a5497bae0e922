"""How many seconds lightning_mtl adds to `import lightning`.

Run:    python benchmarks/import_time.py [repeats]
Prints: the median over fresh processes of each import, their difference, and what lightning_mtl takes where
        lightning was imported just before: the same question without the noise of starting up. The package imports
        its parts on first use, so all of its public names are asked for.
"""

import statistics
import subprocess
import sys

OURS = "from lightning_mtl import *"
TIMED = """
import time
start = time.perf_counter()
{first}
middle = time.perf_counter()
{second}
print(middle - start, time.perf_counter() - middle)
"""


def seconds(first: str, second: str = "") -> tuple[float, float]:
    """What the two statements take, one after the other, in a fresh process."""
    code = TIMED.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one, two = map(float, done.stdout.split()[-2:])
    return one, two


def main(repeats: int = 7) -> None:
    seconds(OURS)  # writes the byte code and warms the disk cache
    alone, ours, added = [], [], []
    for _ in range(repeats):  # taken in turn, so that a busy machine slows all three alike
        alone.append(seconds("import lightning")[0])
        ours.append(seconds(OURS)[0])
        added.append(seconds("import lightning", OURS)[1])
    base, both = statistics.median(alone), statistics.median(ours)
    print(f"import lightning                   {base:6.2f} s   (median of {repeats} fresh processes)")
    print(f"{OURS}        {both:6.2f} s")
    print(f"difference                         {both - base:6.2f} s")
    print(f"the same after import lightning    {statistics.median(added):6.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
