"""Trackers: what they are told, what a stopped run tells again, and that none ends a run."""

import importlib.util
import json
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

import rlhf.trackers
from rlhf.trackers import Trackers, as_markdown, start_trackers

ROOT = Path(__file__).parent.parent
SAMPLES = [
    {"prompt": "Name a colour.", "response": "**Blue**\n```\n<b># or `green`", "score": 4.25},
    {"prompt": "Hi", "response": "", "score": 1.0},
]


def events(folder: Path) -> dict[str, list[tuple[int, float | str]]]:
    """The scalars and texts in TensorBoard's files, as TensorBoard reads them."""
    found: dict[str, list[tuple[int, float | str]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        read = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in read.Scalars(tag))
        for tag in read.Tags()["tensors"]:
            texts = ((e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(tag))
            found.setdefault(tag.removesuffix("/text_summary"), []).extend(texts)
    return found


def start(report_to: str, folder: Path, **arguments: object) -> Trackers:
    return start_trackers(report_to, folder=folder, arguments={"seed": 1, **arguments})


def tell_some(trackers: Trackers) -> None:
    trackers.log({"loss": 0.75, "rewards/chosen": -1.5}, 1)
    trackers.log({"loss": 0.5}, 2)
    trackers.show(SAMPLES, 2)
    trackers.finish()


@pytest.fixture
def fakes(monkeypatch) -> dict[str, mock.Mock]:
    """Trackers that do nothing, in the place of accelerate's, by name."""
    made = {name: mock.Mock() for name in ("tensorboard", "wandb", "trackio")}
    made["wandb"].tracker.step = 0
    monkeypatch.setattr(rlhf.trackers, "usable_trackers", lambda report_to: ([*made], ""))
    monkeypatch.setattr(
        rlhf.trackers, "build_tracker", lambda tracker, *_, **options: made[tracker]
    )
    monkeypatch.setattr(rlhf.trackers, "drop_trackio_run", lambda name: None)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Table=dict))
    return made


def test_no_tracker_means_no_file(tmp_path, monkeypatch):
    trackers = start("none", tmp_path)
    monkeypatch.setattr(rlhf.trackers, "usable_trackers", lambda report_to: ([], ""))
    for none in (trackers, start("all", tmp_path)):
        tell_some(none)
        assert not none
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_tells(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.trackers, "is_main_process", lambda: False)
    assert not start("all", tmp_path)


def test_tensorboard_gets_numbers_and_texts_into_the_runs_folder(tmp_path):
    trackers = start("tensorboard", tmp_path, beta=0.2, reward_fn=None, do_sampling=True)
    assert trackers
    tell_some(trackers)
    found = events(tmp_path / "rlhf/tensorboard")
    assert found["loss"] == [(1, 0.75), (2, 0.5)]
    assert found["rewards/chosen"] == [(1, -1.5)]
    assert found["samples/1"] == [(2, as_markdown(SAMPLES[0]))]
    assert found["samples/2"] == [(2, as_markdown(SAMPLES[1]))]
    assert "| `--beta`        | `0.2`  |" in found["arguments"][0][1]
    assert len({*(tmp_path / "rlhf").rglob("events*")}) == 1, "one run, and none beside it"


def test_what_a_model_writes_is_shown_as_it_is_and_not_as_markup():
    html = markdown_to_safe_html(as_markdown(SAMPLES[0]))
    shown = "**Blue**\n```\n&lt;b&gt;# or `green`\n"
    assert html.count("<code>") == 2 and f"<code>{shown}</code>" in html
    assert "<strong>score</strong> 4.25" in html


def test_a_run_that_goes_on_replaces_what_it_has_told_tensorboard(tmp_path):
    first = start("tensorboard", tmp_path)
    for step in range(5):
        first.log({"loss": 1.0}, step)
    # What a process leaves that is killed while it makes room for the next telling.
    (tmp_path / "rlhf/.tensorboard.old.tmp/half").mkdir(parents=True)
    again = start("tensorboard", tmp_path)
    for step in range(3):
        again.log({"loss": 2.0}, step)
    again.finish()
    assert events(tmp_path)["loss"] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_a_run_that_goes_on_is_the_same_one_and_another_is_not(tmp_path):
    names = []
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        start("tensorboard", tmp_path / folder)
        names.append((tmp_path / folder / "rlhf/id").read_text(encoding="utf-8"))
    assert names[0] == names[1] != names[2]


def test_wandb_is_told_what_it_has_not_seen(fakes, tmp_path):
    fakes["wandb"].tracker.step = 2  # the first that it waits for
    trackers = start("all", tmp_path)
    trackers.show(SAMPLES, 1)
    tell_some(trackers)
    assert [call.kwargs["step"] for call in fakes["wandb"].log.call_args_list] == [2]
    assert [call.kwargs["step"] for call in fakes["tensorboard"].log.call_args_list] == [1, 2]
    data = [[*sample.values()] for sample in SAMPLES]
    table = {"columns": ["prompt", "response", "score"], "data": data}
    fakes["wandb"].log_table.assert_called_once_with("samples", step=2, **table)
    fakes["trackio"].log.assert_called_with({"samples": table}, step=2)


def test_a_tracker_that_cannot_start_is_named_and_the_others_are_told(fakes, tmp_path, capsys):
    fakes["wandb"].start.side_effect = RuntimeError("no\nnetwork")
    fakes["trackio"].store_init_configuration.side_effect = KeyError()
    trackers = start("all", tmp_path)
    assert [*trackers.started] == ["tensorboard"]
    tell_some(trackers)
    assert fakes["tensorboard"].log.call_count == 2 and not fakes["wandb"].log.called
    assert capsys.readouterr().out.splitlines() == [
        "note: --report_to=wandb: no network; the run goes on without it",
        "note: --report_to=trackio: KeyError; the run goes on without it",
    ]


@pytest.mark.parametrize("moment", ["log", "log_table", "finish"])
def test_a_tracker_that_fails_later_is_named_once_and_told_no_more(moment, fakes, tmp_path, capsys):
    getattr(fakes["wandb"], moment).side_effect = OSError(28, "No space left on device")
    tell_some(start("all", tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: --report_to=wandb: [Errno 28] No space left on device; the run")
    assert fakes["wandb"].log.call_count == (1 if moment == "log" else 2)
    assert fakes["tensorboard"].finish.called and fakes["trackio"].finish.called


def test_who_stops_the_run_is_obeyed_by_trackers_too(fakes, tmp_path):
    fakes["wandb"].log.side_effect = SystemExit(143)
    with pytest.raises(SystemExit):
        start("all", tmp_path).log({"loss": 1.0}, 1)


def test_starting_trackers_draws_no_random_number(fakes, tmp_path):
    fakes["trackio"].start.side_effect = lambda: random.seed(5)
    before = random.getstate()
    start("all", tmp_path)
    assert random.getstate() == before


def test_an_older_telling_of_the_same_run_leaves_trackio(monkeypatch):
    old, other = SimpleNamespace(name="m 1"), SimpleNamespace(name="m 2")
    old.delete, other.delete = mock.Mock(), mock.Mock()
    api = SimpleNamespace(runs=lambda project: [old, other])
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Api=lambda: api))
    rlhf.trackers.drop_trackio_run("m 1")
    assert old.delete.called and not other.delete.called
    api.runs = mock.Mock(side_effect=ValueError("Project 'rlhf' does not exist"))
    rlhf.trackers.drop_trackio_run("m 1")


# In a process of their own, which has no hooks of pytest's; W&B and Trackio start more of them

TELLER = """
import sys
from pathlib import Path
from tests.test_trackers import start, tell_some
trackers, fill = start(sys.argv[1], Path(sys.argv[2])), sys.argv[3:]
for file in (Path(sys.argv[2]) / "rlhf/tensorboard").glob("events.*") if fill else ():
    file.unlink()
    file.symlink_to("/dev/full")
tell_some(trackers)
"""


def tell_in_another_process(report_to: str, folder: Path, *options: str) -> str:
    if importlib.util.find_spec(report_to) is None:
        pytest.skip(f"{report_to} is not installed")
    where = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-c", TELLER, report_to, str(folder), *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **where}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_costs_tensorboard_and_no_traceback(tmp_path):
    told = tell_in_another_process("tensorboard", tmp_path, "fill").splitlines()
    assert [line for line in told if "note: " in line or "rror" in line] == [
        "note: --report_to=tensorboard: [Errno 28] No space left on device;"
        " the run goes on without it"
    ]


@pytest.mark.slow
def test_wandb_writes_the_run_into_its_folder(tmp_path):
    told = tell_in_another_process("wandb", tmp_path)
    assert "goes on without" not in told and f"wandb sync {tmp_path}/rlhf/wandb/offline-run" in told
    (table,) = (tmp_path / "rlhf/wandb").glob("offline-run-*/files/media/table/samples_2_*.json")
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found["columns"] == ["prompt", "response", "score"]
    assert found["data"] == [[*sample.values()] for sample in SAMPLES]


@pytest.mark.slow
def test_trackio_holds_every_step_once_however_often_the_run_was_stopped(tmp_path):
    for _ in range(2):
        assert "goes on without" not in tell_in_another_process("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio/rlhf.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    assert [step for step, _ in rows] == [1, 2, 2]
    assert json.loads(rows[0][1]) == {"loss": 0.75, "rewards/chosen": -1.5}
    assert json.loads(rows[2][1])["samples"]["_value"] == SAMPLES
