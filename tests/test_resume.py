"""Stopped runs: the same command goes on, and ends in the bytes of a run that nothing disturbed."""

import json
import os
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import rlhf.rewards
import run_dpo
import run_ppo
import run_rm
import run_sft
from rlhf.batches import Room
from rlhf.disk import flaw_of
from rlhf.errors import InputError, RunError, is_out_of_memory
from rlhf.resume import Progress, Stopped
from tests.faults.world import content
from tests.test_scripts import PPO, rows, run
from tests.test_trackers import events

SCRIPTS = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo, "dpo": run_dpo}
OPTIONS = {
    "sft": ["--num_epochs=2", "--batch_size=8", "--learning_rate=1e-3", "--dropout=0.1"],
    "rm": ["--num_epochs=2", "--batch_size=16", "--learning_rate=1e-3", "--loss=pairwise"],
    "ppo": [*PPO, "--num_outer_epoch=2", "--minibatch_size=8", "--eval_samples=4"],
    "dpo": ["--num_epochs=2", "--batch_size=8", "--learning_rate=1e-3"],
}
OPTIONS = {stage: [*options, "--log_step=2"] for stage, options in OPTIONS.items()}
# Where a signal comes: the function, and which call of it.
MOMENTS = [
    ("sft", "summed_loss", 9),
    ("sft", "optimizer_step", 2),
    ("sft", "evaluate", 1),
    pytest.param("sft", "evaluate", 2, marks=pytest.mark.slow),
    pytest.param("rm", "score_rows", 5, marks=pytest.mark.slow),
    pytest.param("rm", "optimizer_step", 3, marks=pytest.mark.slow),
    pytest.param("dpo", "response_logprobs", 8, marks=pytest.mark.slow),
    ("dpo", "check_first_loss", 1),
    pytest.param("ppo", "roll_out", 3, marks=pytest.mark.slow),
    pytest.param("ppo", "score_responses", 4, marks=pytest.mark.slow),
    pytest.param("ppo", "policy_forward", 2, marks=pytest.mark.slow),
    pytest.param("ppo", "policy_forward", 5, marks=pytest.mark.slow),
    ("ppo", "optimizer_step", 4),
]


@pytest.fixture(scope="module")
def parents(tmp_path_factory, base_path, data_dir):
    """An SFT and a reward model that nothing here changes."""
    root = tmp_path_factory.mktemp("parents")
    run("sft", root, data_dir, f"--model_id={base_path}", "--num_epochs=1")
    run("rm", root, data_dir, "--num_epochs=1")
    return root


@pytest.fixture(scope="module")
def start(parents, base_path, data_dir):
    """Start a stage in a folder, always by the same command but for what is added."""

    def start(stage, ckpt_dir, *more):
        base = [f"--model_id={base_path}"] if stage == "sft" else []
        return run(stage, parents, data_dir, *base, *OPTIONS[stage], *more, ckpt_dir=ckpt_dir)

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Each stage, run in one go; made when first asked for."""
    made = {}

    def folder(stage):
        if stage not in made:
            made[stage] = start(stage, tmp_path_factory.mktemp(f"whole_{stage}"))
        return made[stage]

    return folder


def send_signal_at(monkeypatch, script, name, call, number=signal.SIGTERM):
    """Send a signal to this process when a function of a script is called for the n-th time."""
    real, calls = getattr(script, name), []

    def watched(*args, **options):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **options)

    monkeypatch.setattr(script, name, watched)


def stop(stage, start, folder, name, call, number=signal.SIGTERM):
    """Start a stage and send it a signal; returns its exit code."""
    before = signal.signal(number, signal.SIG_DFL)  # a shell's & has it ignored, and so would we
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            send_signal_at(patch, SCRIPTS[stage], name, call, number)
            start(stage, folder)
    finally:
        signal.signal(number, before)
    return caught.value.code


@pytest.mark.parametrize(("stage", "name", "call"), MOMENTS)
def test_resumed_run_equals_uninterrupted_run(stage, name, call, start, undisturbed, tmp_path):
    assert stop(stage, start, tmp_path, name, call) == 143
    start(stage, tmp_path)
    assert content(tmp_path) == content(undisturbed(stage))


@pytest.mark.parametrize("is_crash", [False, True])
def test_a_tracker_of_a_resumed_run_holds_every_step_once(
    is_crash, start, undisturbed, tmp_path, monkeypatch
):
    """After a signal, and after a crash that loses steps which the tracker has seen."""

    def told(stage, folder):
        return start(stage, folder, "--report_to=tensorboard")

    if is_crash:
        steps = [run_sft.optimizer_step] * 7 + [mock.Mock(side_effect=RunError("lost"))]
        step = mock.Mock(side_effect=lambda *args, **options: steps.pop(0)(*args, **options))
        with monkeypatch.context() as patch, pytest.raises(RunError, match="lost"):
            patch.setattr(run_sft, "optimizer_step", step)
            told("sft", tmp_path)
    else:
        assert stop("sft", told, tmp_path, "optimizer_step", 8) == 143
    seen = [2, 4, 6] if is_crash else [2, 4, 6, 8]  # the state of a crash is older: of step 4
    assert [step for step, _ in events(tmp_path)["loss"]] == seen
    told("sft", tmp_path)
    assert content(tmp_path) == content(undisturbed("sft"))
    losses = [row["step"] for row in rows(tmp_path) if "loss" in row]
    assert [step for step, _ in events(tmp_path)["loss"]] == losses
    epochs = [row["step"] for row in rows(tmp_path) if "eval_loss" in row]
    assert [step for step, _ in events(tmp_path)["samples/1"]] == epochs


@pytest.mark.slow
def test_a_run_can_be_stopped_at_every_step(start, undisturbed, tmp_path, capsys):
    for _ in range(4):
        assert stop("ppo", start, tmp_path, "optimizer_step", 1, signal.SIGINT) == 130
        told = capsys.readouterr().out.splitlines()
        assert told[-1].startswith("stopped by SIGINT after step ")
        assert len([*(tmp_path / ".resume").glob("state-*")]) == 2
    start("ppo", tmp_path)
    assert content(tmp_path) == content(undisturbed("ppo"))


def test_an_interrupted_epoch_keeps_the_checkpoints_before_it(start, undisturbed, tmp_path):
    stop("sft", start, tmp_path, "evaluate", 3)  # before training, after epoch 1, after epoch 2
    whole = undisturbed("sft")
    (first,) = [path.name for path in whole.glob("*_epoch=1_*")]
    assert [path.name for path in tmp_path.glob("[!.]*_epoch=*")] == [first]
    assert os.readlink(tmp_path / "best") == first


def test_dropout_goes_on_where_it_was(start, undisturbed, tmp_path, monkeypatch):
    """Were its noise not told by the step, a resumed run of SFT would drop other units."""
    stop("sft", start, tmp_path, "optimizer_step", 3)
    monkeypatch.setattr("rlhf.resume.torch.manual_seed", lambda _: None)
    start("sft", tmp_path)
    assert content(tmp_path) != content(undisturbed("sft"))


def test_noise_is_told_by_seed_step_and_process(start, tmp_path, monkeypatch):
    """Each step and each process drops other units, and the same ones whenever it is repeated."""

    def seeds(name, process, *options):
        seen = []
        monkeypatch.setattr("rlhf.resume.process_index", lambda: process)
        add_gradient = run_sft.add_gradient
        with monkeypatch.context() as patch:
            patch.setattr(
                run_sft,
                "add_gradient",
                lambda *args: (seen.append(torch.initial_seed()), add_gradient(*args))[1],
            )
            start("sft", tmp_path / name, "--max_steps=4", *options)
        return seen

    first = seeds("first", 0)
    assert len(set(first)) == 4
    assert seeds("again", 0) == first
    assert not set(seeds("second", 1)) & set(first)
    assert not set(seeds("other", 0, "--seed=7")) & set(first)


def test_a_signal_while_processes_agree_counts_after_the_next_step(
    start, tmp_path, monkeypatch, capsys
):
    """It comes when what this process says is said already: with two, the other must hear it."""
    heard = []

    def agree(numbers, device):
        heard.append(numbers)
        if len(heard) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return list(map(int, numbers))

    monkeypatch.setattr("rlhf.resume.num_processes", lambda: 2)
    monkeypatch.setattr("rlhf.resume.most_of_processes", agree)
    with pytest.raises(Stopped):
        start("sft", tmp_path)
    assert [numbers[0] for numbers in heard[-3:]] == [0, 0, signal.SIGTERM]
    assert len(heard) == 6


def test_a_state_that_one_process_alone_cannot_read_stops_it(start, tmp_path, monkeypatch):
    """It would go on with an older one, while the others take what the first has chosen."""
    stop("sft", start, tmp_path, "optimizer_step", 3)
    monkeypatch.setattr("rlhf.resume.is_main_process", lambda: False)
    monkeypatch.setattr("rlhf.resume.most_of_processes", lambda numbers, device: [1])
    monkeypatch.setattr("rlhf.resume.load_tensors", lambda *_, **__: None)
    with pytest.raises(RunError, match="cannot read it, but the first one can"):
        start("sft", tmp_path)


# What else may be in the folder


def test_a_finished_run_started_again_does_nothing(start, undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed("sft"), tmp_path / "sft", symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    start("sft", folder)
    assert "this very run is finished; best checkpoint: " in capsys.readouterr().out
    start("sft", folder, "--keep=1", "--save_every=1", "--log_step=3", "--report_to=none")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match=r"--resume=must: .* is finished"):
        start("sft", folder, "--resume=must")


def test_a_finished_run_started_otherwise_moves_away_whole(start, undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed("sft"), tmp_path / "sft", symlinks=True)
    whole = content(folder)
    start("sft", folder, "--learning_rate=2e-3")
    assert f"is now in {folder / 'earlier/1'}" in capsys.readouterr().out
    assert content(folder / "earlier/1") == whole
    assert content(folder) != whole


def test_a_stopped_run_started_otherwise_tells_the_differences(start, tmp_path, data_dir):
    folder = tmp_path / "sft"
    stop("sft", start, folder, "optimizer_step", 3)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        start("sft", folder, "--learning_rate=2e-3", "--seed=1")
    told = str(caught.value)
    assert "(--learning_rate was 0.001, is 0.002; --seed was 42, is 1)" in told
    assert "--resume=never" in told
    assert sorted(folder.rglob("*")) == before
    start("sft", folder, "--learning_rate=2e-3", "--resume=never")
    assert (folder / "earlier/1/.resume").is_dir()


def test_changed_data_or_a_changed_parent_is_a_difference(start, parents, base_path, tmp_path):
    copy = shutil.copytree(base_path, tmp_path / "base")
    folder = tmp_path / "sft"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        send_signal_at(patch, run_sft, "optimizer_step", 2)
        start("sft", folder, f"--model_id={copy}")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    with pytest.raises(InputError, match=r"--model_id=.*/base: its content has changed"):
        start("sft", folder, f"--model_id={copy}")
    # The same content under another name is the same model.
    shutil.copytree(base_path, tmp_path / "elsewhere" / "base")
    start("sft", folder, f"--model_id={tmp_path}/elsewhere/base")


def test_must_goes_on_or_fails(start, undisturbed, tmp_path):
    with pytest.raises(InputError, match=r"--resume=must: .* holds no state"):
        start("sft", tmp_path / "sft", "--resume=must")
    assert not (tmp_path / "sft").exists()
    stop("sft", start, tmp_path / "sft", "optimizer_step", 3)
    start("sft", tmp_path / "sft", "--resume=must")
    assert content(tmp_path / "sft") == content(undisturbed("sft"))


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "SHA256SUMS"])
def test_a_damaged_state_is_told_and_the_older_one_serves(
    name, start, undisturbed, tmp_path, capsys
):
    stop("sft", start, tmp_path, "evaluate", 3)
    newest = max((tmp_path / ".resume").glob("state-*"))
    flip(newest / name)
    start("sft", tmp_path)
    assert f"note: {newest} is damaged" in capsys.readouterr().out
    assert content(tmp_path) == content(undisturbed("sft"))


def test_nothing_is_made_up_if_every_state_is_damaged(start, tmp_path):
    stop("sft", start, tmp_path, "evaluate", 3)
    states = sorted((tmp_path / ".resume").glob("state-*"))
    assert len(states) == 2
    for state in states:
        (state / "tensors.safetensors").unlink()
    with pytest.raises(InputError, match=r"every state .* is damaged; --resume=never"):
        start("sft", tmp_path)
    assert rows(tmp_path)  # what was logged is not lost either
    for state in states:
        shutil.rmtree(state)
    with pytest.raises(InputError, match=r"there is no state in .*; --resume=never"):
        start("sft", tmp_path)


def test_a_damaged_record_of_the_run_is_told(start, tmp_path):
    stop("sft", start, tmp_path, "optimizer_step", 3)
    flip(tmp_path / ".resume/run.json")
    with pytest.raises(InputError, match=r"run\.json, which tells what it was made from, is dam"):
        start("sft", tmp_path)


def test_keep_leaves_the_newest_and_the_best(start, tmp_path):
    start("sft", tmp_path, "--keep=1", "--num_epochs=4", "--learning_rate=0.1")
    kept = {path.name for path in tmp_path.glob("[!.]*_epoch=*")}
    (newest,) = [path.name for path in tmp_path.glob("*_epoch=4_*")]
    assert kept == {newest, os.readlink(tmp_path / "best")}


# Memory and disk


@pytest.mark.slow
def test_out_of_memory_halves_the_room_and_changes_no_result(start, undisturbed, tmp_path, capsys):
    real, rooms = run_sft.add_gradient, []

    def small_memory(*args):
        rooms.append(args[-1].tokens)
        result = real(*args)
        if args[-1].tokens > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sft, "add_gradient", small_memory)
        start("sft", tmp_path, "--dropout=0")
    assert rooms[:6] == [8192, 4096, 2048, 1024, 512, 256] and set(rooms[6:]) == {256}
    assert (
        "note: out of memory; going on with 256 tokens in a forward, the batch stays"
        in capsys.readouterr().out
    )
    whole = start("sft", tmp_path / "whole", "--dropout=0")
    for ours, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        for row in (ours, theirs):
            row.pop("tokens_per_second", None)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_too_much_memory_for_one_sequence_is_told(start, tmp_path):
    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sft, "add_gradient", no_memory)
        with pytest.raises(RunError, match=r"one sequence .* --max_len or --batch_size"):
            start("sft", tmp_path, "--micro_batch_size=2")


def test_other_errors_are_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert is_out_of_memory(MemoryError())


def test_a_disk_that_is_too_small_is_told_before_training(start, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=0, used=0, free=50_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"checkpoints and the state .* take about .* free"):
        start("sft", tmp_path)
    monkeypatch.undo()
    start("sft", tmp_path)  # after something was freed, the same command goes on


def test_room_is_halved_down_to_one():
    room, seen = Room(5), []
    while room:
        seen.append(room.sequences)
        room = room.halved()
    assert seen == [5, 2, 1]


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_what_the_shell_ignores_stays_ignored(ignored, start, undisturbed, tmp_path):
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            send_signal_at(patch, run_sft, "optimizer_step", 2, ignored)
            start("sft", tmp_path)
    finally:
        signal.signal(ignored, before)
    assert content(tmp_path) == content(undisturbed("sft"))


# What a review found


def test_a_crash_before_the_state_leaves_the_best_checkpoint(start, tmp_path, monkeypatch):
    """With --keep the state must name a checkpoint that is still there."""
    with monkeypatch.context() as patch:
        real, calls = Progress.save, []

        def save(self):
            calls.append(self)
            if len(calls) == 3:  # before training, after epoch 1, after epoch 2
                raise KeyboardInterrupt
            real(self)

        patch.setattr(Progress, "save", save)
        with pytest.raises(KeyboardInterrupt):
            start("sft", tmp_path, "--keep=1")
    assert len([*tmp_path.glob("[!.]*_epoch=*")]) == 2
    start("sft", tmp_path, "--keep=1")
    assert (tmp_path / "best" / "config.json").is_file()
    assert len([*tmp_path.glob("[!.]*_epoch=*")]) == 1


def test_a_damaged_state_is_none_of_the_two(start, tmp_path):
    stop("sft", start, tmp_path, "evaluate", 3)
    flip(max((tmp_path / ".resume").glob("state-*")) / "tensors.safetensors")
    stop("sft", start, tmp_path, "optimizer_step", 1)
    states = sorted((tmp_path / ".resume").glob("state-*"))
    assert len(states) == 2 and all(flaw_of(state) is None for state in states)


def test_another_scale_of_scores_is_a_difference(start, parents, data_dir, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / "data")
    own = [f"--data_dir={data}/rm"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        send_signal_at(patch, run_rm, "optimizer_step", 2)
        start("rm", tmp_path / "rm", *own)
    (data / "manifest.json").write_text(json.dumps({"score_scale": [0, 20]}))
    with pytest.raises(InputError, match=r"--data_dir=.*: its content has changed"):
        start("rm", tmp_path / "rm", *own)


def test_another_reward_function_is_a_difference(start, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_lengths.py"
    module.write_text("def score(prompts, responses): return [len(r) for r in responses]")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        send_signal_at(patch, run_ppo, "optimizer_step", 2)
        start("ppo", tmp_path / "ppo", "--reward_fn=my_lengths:score")
    module.write_text(module.read_text().replace("len(r)", "-len(r)"))
    with pytest.raises(InputError, match=r"--reward_fn=.*my_lengths\.py: its content has changed"):
        start("ppo", tmp_path / "ppo", "--reward_fn=my_lengths:score")


@pytest.mark.slow
def test_scoring_that_does_not_fit_is_done_in_smaller_parts(start, undisturbed, tmp_path):
    real, sizes = rlhf.rewards.reward_logits, []

    def small_memory(model, batch, **options):
        sizes.append(len(batch.response_ids))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.rewards, "reward_logits", small_memory)
        start("ppo", tmp_path, "--micro_batch_size=16", "--max_steps=1")
    assert 4 in sizes and max(sizes) > 4


def test_a_signal_at_the_edge_ends_without_a_traceback(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "__enter__", lambda self: (_ for _ in ()).throw(Stopped(143)))
    with pytest.raises(SystemExit) as caught:
        start("sft", tmp_path)
    assert caught.value.code == 143


def test_a_backward_pass_comes_by_python_at_every_weight(start, tmp_path, monkeypatch):
    """It is one call, which may take half a minute; signals are seen in Python only."""
    load, models = run_sft.load_policy, []

    def watched(*args, **options):
        models.append(load(*args, **options))
        return models[0]

    monkeypatch.setattr(run_sft, "load_policy", watched)
    start("sft", tmp_path, "--max_steps=1")
    assert all(p._post_accumulate_grad_hooks for p in models[0].parameters())
