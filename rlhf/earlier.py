"""EARLIER: the runs that a stage's folder holds, and how one makes place for the next."""

from collections.abc import Mapping
from pathlib import Path

from rlhf.checkpoints import RUN_FILE
from rlhf.disk import LOCK, hidden, sync_to_disk
from rlhf.errors import InputError

EARLIER = "earlier"
RESUME = ".resume"
STATES = "state-*"  # in RESUME


def is_of_a_run(entry: Path) -> bool:
    """Tell whether a run wrote this: a checkpoint, a log, a tracker's folder, a hidden leftover."""
    known = {"best", "metrics.jsonl", "training.png", "rlhf", RESUME, EARLIER, LOCK}
    is_leftover = entry.name.startswith(".") and entry.name.endswith(".tmp")
    return entry.name in known or is_leftover or (entry / RUN_FILE).is_file()


def check_run_folder(folder: Path, inputs: Mapping[str, str]) -> None:
    """Check, without writing, that a run may start in `folder`, and moving what is there is safe.

    `inputs` maps flags to the paths that the run reads. Raises: InputError.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--ckpt_dir={folder}: is a file; name a folder")
    for entry in sorted(folder.iterdir()) if folder.exists() else []:
        if not is_of_a_run(entry):
            raise InputError(
                f"--ckpt_dir={folder}: holds {entry.name}, which no run wrote; name a new folder"
            )
    for flag, path in inputs.items():
        real = Path(path).resolve()
        inside = real.is_relative_to(folder.resolve())
        if inside and real.exists() and not real.is_relative_to(folder.resolve() / EARLIER):
            raise InputError(
                f"{flag}={path} lies in --ckpt_dir={folder}, whose earlier run is about to move"
                f" away; name another --ckpt_dir"
            )


def move_to_earlier(folder: Path) -> str:
    """Move the run that a folder holds, if any, whole into `earlier/<n>/`; return a line or "".

    What tells how to go on with it moves first: if this is cut short, nobody goes on with a half.
    """
    earlier = folder / EARLIER
    numbers = [int(entry.name) for entry in earlier.glob("*") if entry.name.isdigit()]
    destination = earlier / str(max(numbers, default=0) + 1)
    entries = [entry for entry in folder.iterdir() if entry.name not in {EARLIER, LOCK}]
    if not entries and not hidden(destination).exists():
        return ""
    hidden(destination).mkdir(parents=True, exist_ok=True)
    for entry in sorted(entries, key=lambda entry: entry.name != RESUME):
        entry.rename(hidden(destination) / entry.name)
    sync_to_disk(hidden(destination))
    sync_to_disk(folder)
    hidden(destination).rename(destination)
    sync_to_disk(earlier)
    return f"the earlier run in {folder} is now in {destination}"
