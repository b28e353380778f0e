"""Processes that are killed: at random instants, and at calls that change the disk.

Such a call is Python's, or, where strace can be used, the system's own, which libraries make too.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.disk import flaw_of
from tests.faults.world import World, content, run_apart, wait

CHANGES = ("fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink")
SYSTEM_CALLS = "fsync,mkdir,rename,renameat,renameat2,rmdir,symlink,symlinkat,unlink,unlinkat"
WAYS = ["time", "term", "call", *(["strace"] if shutil.which("strace") else [])]


def die_before(number: int) -> Callable[[], None]:
    """Make what lets this process kill itself before its n-th call that changes the disk."""

    def arm() -> None:
        left = [number]

        def watched(real: Callable) -> Callable:
            def call(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in CHANGES:
            setattr(os, name, watched(getattr(os, name)))

    return arm


def run_traced(body: Callable[[], None], world: World, number: int) -> int:
    """Run something until its n-th system call that changes the disk; returns its exit code."""
    pid = run_apart(lambda: (os.kill(os.getpid(), signal.SIGSTOP), body()), world.log)
    os.waitpid(pid, os.WUNTRACED)
    inject = ["-e", f"inject={SYSTEM_CALLS}:signal=KILL:when={number}"]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SYSTEM_CALLS}", *inject]
    tracer = subprocess.Popen([*command, "-p", str(pid)])
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text() and tracer.poll() is None:
        time.sleep(0.005)
    os.kill(pid, signal.SIGCONT)
    code = wait(pid)
    tracer.wait()
    return code


def epochs(folder: Path) -> dict[str, str]:
    """The finished checkpoints in a folder, each with what its checksums say."""
    return {p.name: (p / "SHA256SUMS").read_text() for p in folder.glob("[!.]*_epoch=*")}


def flaws(folder: Path) -> list[str]:
    """What is not whole under a final name."""
    found = []
    for path in [*folder.glob("[!.]*_epoch=*"), *folder.glob(".resume/state-*")]:
        if flaw := flaw_of(path):
            found.append(f"{path.name}: {flaw}")
    best = folder / "best"
    if best.is_symlink() and not (best / "config.json").is_file():
        found.append("best points nowhere")
    for path in sorted(folder.glob("[!.]*_epoch=*"))[-1:]:
        kind = AutoModelForSequenceClassification if "_rm_" in path.name else AutoModelForCausalLM
        kind.from_pretrained(path)
    return found


def trial(world: World, stage: str, folder: Path, rng: random.Random, counts: Counter) -> None:
    """Kill a run one to three times, check the folder each time, and let it end in peace."""
    known: dict[str, str] = {}
    keep = rng.choice((0, 0, 1))
    body = world.stage(stage, folder, f"--save_every={rng.choice((10.0, 1e-4))}", f"--keep={keep}")
    for _ in range(rng.randint(1, 3)):
        how = rng.choice(WAYS)
        counts[f"by {how}"] += 1
        if how == "call":
            arm = die_before(rng.randint(1, 250))
            code = wait(run_apart(lambda arm=arm: (arm(), body()), world.log))
        elif how == "strace":
            code = run_traced(body, world, rng.randint(1, 250))
        else:
            number = signal.SIGKILL if how == "time" else signal.SIGTERM
            pid = run_apart(body, world.log)
            time.sleep(rng.uniform(0.1, 1.1) * world.seconds[stage])
            os.kill(pid, number)
            since = time.monotonic()
            code = wait(pid)
            counts["slow exits"] += time.monotonic() - since > 5
        expected = 143 if how == "term" else -9
        # Before the training loop the system's own handlers end the process; and it may be done.
        if code not in (expected, -15 if how == "term" else expected, 0):
            counts["strange exits"] += 1
            print(f"{stage}: {how} ended with {code}: {world.told()[-500:]}")
        counts["kills"] += code != 0
        found = flaws(folder) if folder.exists() else []
        counts["unloadable folders"] += len(found)
        now = epochs(folder) if folder.exists() else {}
        if not keep:  # with --keep they go on purpose; what `flaws` finds is that `best` stands
            counts["lost epochs"] += sum(now.get(name) != sums for name, sums in known.items())
        known = now
    code = world.finish(body)
    expected = content(world.whole(stage))
    seen = content(folder) if code == 0 else {}
    if keep:  # the newest and the best are there, and as they should be
        expected = {name: value for name, value in expected.items() if name in seen}
    same = code == 0 and seen == expected and len(seen) > 2
    counts["runs"] += 1
    counts["equal runs"] += same
    if not same:
        print(f"{stage} in {folder}: exit {code}: {world.told()[-700:]}")
    if not keep:
        now = epochs(folder)
        counts["lost epochs"] += sum(now.get(name) != sums for name, sums in known.items())
    if same:
        shutil.rmtree(folder)


def kill(world: World, number: int, seed: int = 0) -> Counter:
    """Do so many kills, over the four trainers in turn."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    while counts["kills"] < number:
        stage = ("sft", "rm", "ppo", "dpo")[counts["runs"] % 4]
        trial(world, stage, world.root / "killed" / f"{stage}{counts['runs']}", rng, counts)
    return counts
