"""LINEAGE: the run behind a checkpoint, its other epochs, and the runs that it came from."""

from pathlib import Path
from typing import Any, NamedTuple

from rlhf.checkpoints import RUN_FILE, content_of, read_run


class Run(NamedTuple):
    """A checkpoint under the name it has in a report, and what `run.json` tells of its run."""

    name: str
    path: str  # a folder, or an id on the Hub, which has no run
    flag: str  # how it was asked for, for messages

    def facts(self) -> dict[str, Any]:
        """Return the checkpoint's `run.json`; {} where there is none."""
        return read_run(self.path, flag=self.flag)

    @property
    def epoch(self) -> int:
        """The checkpoint's epoch; 1 where nothing tells."""
        return int(self.facts().get("epoch", 1))

    @property
    def folder(self) -> Path:
        """The folder of the run, with its other checkpoints and its curves."""
        return Path(self.path).resolve().parent

    def epochs(self) -> dict[int, Path]:
        """Return the checkpoints that the run left, by epoch, this one among them."""
        found = {self.epoch: Path(self.path)}
        for sibling in self.folder.iterdir():
            if (sibling / RUN_FILE).is_file() and not sibling.is_symlink():
                facts = read_run(str(sibling), flag=self.flag)
                if facts.get("stage") == self.facts().get("stage") and "epoch" in facts:
                    found.setdefault(int(facts["epoch"]), sibling)
        return dict(sorted(found.items()))

    def followed_reward(self) -> str | None:
        """Return the reward model that PPO followed here, if it did and it is still there."""
        arguments = self.facts().get("arguments", {})
        path = None if arguments.get("reward_fn") else arguments.get("rm_model_path")
        return path if path and is_still(path, self.told_content()) else None

    def followed_content(self) -> str | None:
        """Return the fingerprint of that reward model, wherever it is now.

        Older runs tell none: then it is taken for what stands there.
        """
        path = self.followed_reward()
        return self.told_content() or (content_of(path) if path else None)

    def told_content(self) -> str | None:
        """Return the fingerprint of it that the run has kept."""
        return self.facts().get("other_inputs", {}).get("--rm_model_path", {}).get("content")

    def curves(self) -> Path:
        """Return where the picture of the run's training is, if it is finished."""
        return self.folder / "training.png"

    def parents(self) -> list["Run"]:
        """Return the runs that this one started from, as far as they are still there."""
        facts = self.facts()
        parent = facts.get("parent")
        is_there = parent and is_still(parent, facts.get("parent_content"))
        kept = [path for path in (parent if is_there else None, self.followed_reward()) if path]
        return [Run(Path(path).resolve().parent.name, path, self.flag) for path in kept]


def is_still(path: str, content: str | None) -> bool:
    """Whether a checkpoint is there, and the one that it was, if its fingerprint is known."""
    return (Path(path) / RUN_FILE).is_file() and content in (None, content_of(path))


def lineage(runs: list[Run]) -> list[Run]:
    """Return some runs and all that they came from, each once: parents before their children."""
    found: dict[Path, Run] = {}

    def visit(run: Run) -> None:
        if run.facts() and run.folder not in found:
            for parent in run.parents():
                visit(parent)
            found[run.folder] = run

    for run in runs:
        visit(run)
    named = {run.folder: run for run in reversed(runs)}  # the names that were given count
    return [named.get(folder, run) for folder, run in found.items()]
