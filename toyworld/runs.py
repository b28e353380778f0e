"""The run behind a checkpoint: what other epochs it left, and which reward model it followed."""

from pathlib import Path
from typing import Any, NamedTuple

from rlhf.checkpoints import RUN_FILE, read_run


class Run(NamedTuple):
    """A checkpoint under the name it has in the report, and its siblings."""

    name: str
    path: Path

    @property
    def flag(self) -> str:
        """How the checkpoint was asked for, for messages."""
        return f"--model={self.name}"

    def facts(self) -> dict[str, Any]:
        """Return the checkpoint's `run.json`; {} where there is none."""
        return read_run(str(self.path), flag=self.flag)

    @property
    def epoch(self) -> int:
        """The checkpoint's epoch; 1 where nothing tells."""
        return int(self.facts().get("epoch", 1))

    def epochs(self) -> dict[int, Path]:
        """Return the checkpoints that the run left, by epoch, this one among them."""
        found = {self.epoch: self.path}
        for sibling in self.path.resolve().parent.iterdir():
            if (sibling / RUN_FILE).is_file() and not sibling.is_symlink():
                facts = read_run(str(sibling), flag=self.flag)
                if facts.get("stage") == self.facts().get("stage") and "epoch" in facts:
                    found.setdefault(int(facts["epoch"]), sibling)
        return dict(sorted(found.items()))

    def followed_reward(self) -> str | None:
        """Return the reward model that PPO followed here, if it did and it is still there."""
        arguments = self.facts().get("arguments", {})
        path = None if arguments.get("reward_fn") else arguments.get("rm_model_path")
        return path if path and (Path(path) / RUN_FILE).is_file() else None

    def curves(self) -> Path:
        """Return where the picture of the run's training is, if it is finished."""
        return self.path.resolve().parent / "training.png"
