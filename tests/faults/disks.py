"""Disks that are too small, and become large enough."""

import os
import shutil
import subprocess
from collections import Counter

from tests.faults.world import World, content


def reason_to_skip() -> str:
    """Say why no small disk can be made here; "" if it can."""
    if os.geteuid() != 0:
        return "mounting a small disk takes root"
    return "" if shutil.which("mount") else "there is no mount"


def fill(world: World, number: int) -> Counter:
    """Run a stage on so many disk sizes, then make room, and run the same command again."""
    counts: Counter[str] = Counter()
    for i in range(number):
        stage = ("sft", "rm", "ppo", "dpo")[i % 4]
        disk = world.root / "disk"
        disk.mkdir(exist_ok=True)
        whole = sum(p.stat().st_size for p in world.whole(stage).rglob("*") if p.is_file())
        size = 8192 + int(whole * 1.5 * (i + 1) / number)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            # What was estimated before training says nothing of what comes on the way.
            code = world.finish(lambda: (ignore_estimate(), world.stage(stage, disk / stage)()))  # noqa: B023
            counts["sizes"] += 1
            counts["stopped"] += code != 0
            told = [line for line in world.told().splitlines() if "error: " in line]
            counts["not one line"] += code != 0 and len(told) != 1
            if code != 0 and len(told) != 1:
                print(world.told()[-600:])
            subprocess.run([*mount[:4], "remount,size=64m", str(disk)], check=True)
            code = world.finish(world.stage(stage, disk / stage))
            same = code == 0 and content(disk / stage) == content(world.whole(stage))
            counts["recovered"] += same
            if not same:
                print(f"{stage} on {size} bytes: exit {code}: {world.told()[-600:]}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return counts


def ignore_estimate() -> None:
    import rlhf.resume

    rlhf.resume.require_space = lambda *a, **k: None
