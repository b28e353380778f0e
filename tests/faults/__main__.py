"""Run every kind of fault and print what was tried, and what was lost.

python -m tests.faults [--kills 200] [--only kills flips ...]
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf.metrics import format_table
from tests.faults import damage, disks, inputs, kills
from tests.faults.world import World

COUNTED = {"kills", "runs", "equal runs", "flips", "planted", "rows", "texts", "bad inputs"}
COUNTED |= {"sizes", "stopped", "recovered", *(f"by {way}" for way in kills.WAYS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    numbers = {"kills": 200, "flips": 500, "planted": 20, "rows": 10_000, "texts": 10_000}
    numbers["sizes"] = 20
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[*numbers, "commands"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="faults"))
    world = World(root)
    faults: dict[str, Callable[[], Counter]] = {
        "kills": lambda: kills.kill(world, args.kills, args.seed),
        "flips": lambda: damage.flip(world, args.flips, args.seed),
        "planted": lambda: damage.plant(world, args.planted, args.seed),
        "commands": lambda: inputs.misuse(world),
        "rows": lambda: inputs.fuzz(root, args.rows, args.seed),
        "texts": lambda: inputs.inject(world, args.texts, args.seed),
        "sizes": lambda: disks.fill(world, args.sizes),
    }
    table, lost = [], 0
    for name in args.only:
        if name == "sizes" and (reason := disks.reason_to_skip()):
            print(f"sizes: skipped, {reason}")
            continue
        since = time.monotonic()
        counts = faults[name]()
        found = {what: n for what, n in counts.items() if what not in COUNTED}
        lost += sum(found.values())
        tried = ", ".join(f"{n} {what}" for what, n in counts.items() if what in COUNTED)
        losses = ", ".join(f"{n} {what}" for what, n in found.items()) or "nothing"
        minutes = f"{(time.monotonic() - since) / 60:.1f}"
        table.append({"fault": name, "tried": tried, "minutes": minutes, "lost": losses})
        print(table[-1], flush=True)
        lost += counts["runs"] - counts["equal runs"] + counts["sizes"] - counts["recovered"]
    print(f"\n{format_table(table)}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
