"""What is written is whole or not there, and a folder has one writer."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from rlhf import disk
from rlhf.disk import (
    CHECKSUMS,
    LOCK,
    Lock,
    commit,
    flaw_of,
    hidden,
    read_record,
    replace_record,
    replace_text,
    require_space,
    require_unlocked,
    sweep,
)
from rlhf.errors import InputError, RunError

HOLDER = """
import sys, time
from pathlib import Path
from rlhf.disk import Lock
lock = Lock(Path(sys.argv[1]), flag="--x")
print("held", flush=True)
time.sleep(60)
"""


def write(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def test_every_change_of_a_folder_is_a_flaw(tmp_path):
    write(hidden(tmp_path / "x"), a="one", b="two")
    commit(hidden(tmp_path / "x"), tmp_path / "x")
    folder = tmp_path / "x"
    assert flaw_of(folder) is None and os.listdir(tmp_path) == ["x"]
    (folder / "a").write_text("One")
    assert flaw_of(folder) == "a has changed"
    (folder / "a").unlink()
    assert flaw_of(folder) == "a is missing"
    (folder / CHECKSUMS).write_text("")
    assert flaw_of(folder) == f"its {CHECKSUMS} is not whole"
    (folder / CHECKSUMS).unlink()
    assert flaw_of(folder) == f"its {CHECKSUMS} cannot be read"
    assert flaw_of(tmp_path / "nowhere") == f"its {CHECKSUMS} cannot be read"


def test_what_stands_there_already_stays_and_what_is_damaged_is_replaced(tmp_path):
    final = tmp_path / "x"
    for _ in range(2):
        write(hidden(final), a="one")
        commit(hidden(final), final)
    inode = final.stat().st_ino
    write(hidden(final), a="one")
    commit(hidden(final), final)
    assert final.stat().st_ino == inode
    (final / "a").write_text("damaged")
    write(hidden(final), a="one")
    commit(hidden(final), final)
    assert flaw_of(final) is None and os.listdir(tmp_path) == ["x"]


def test_the_order_is_write_sync_rename_sync(tmp_path, monkeypatch):
    """What a power cut may lose is decided by this order."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    write(hidden(tmp_path / "x"), a="one", b="two")
    commit(hidden(tmp_path / "x"), tmp_path / "x")
    # a, b, the checksums and the folder; the new name; the folder that holds it.
    assert calls == ["fsync"] * 4 + ["replace", "fsync"]


def test_leftovers_of_dead_processes_are_swept(tmp_path):
    write(tmp_path / ".x.tmp", a="half")
    (tmp_path / ".y.tmp").write_text("half")
    (tmp_path / ".best.tmp").symlink_to("nowhere")
    (tmp_path / "x").write_text("whole")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["x"]


def test_a_record_is_read_only_as_it_was_written(tmp_path):
    path = tmp_path / "run.json"
    assert read_record(path) is None
    replace_record(path, {"a": [1, None], "b": 0.1})
    assert read_record(path) == {"a": [1, None], "b": 0.1}
    for text in (path.read_text().replace("0.1", "0.2"), "{", "[1]", "{}", ""):
        path.write_text(text)
        assert read_record(path) is None


def test_a_second_process_is_told_who_holds_a_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        told = f"--x={tmp_path}: is in use by process {holder.pid} on "
        for take in (require_unlocked, Lock):
            with pytest.raises(InputError, match=told):
                take(tmp_path, flag="--x")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).exists()  # the dead cannot remove it, and need not
    require_unlocked(tmp_path, flag="--x")
    with Lock(tmp_path, flag="--x"):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert os.listdir(tmp_path) == []


def test_a_lock_that_a_full_disk_refuses_is_not_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write", "truncate"):
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, name, full)
            with pytest.raises(OSError, match="No space left"):
                Lock(tmp_path, flag="--x")
        assert os.listdir(tmp_path) == []
        Lock(tmp_path, flag="--x").release()


def test_space_is_asked_for_before_it_is_needed(tmp_path):
    require_space(tmp_path, 1000, what="it", remedy="free some")
    with pytest.raises(RunError, match=r"it will take about 1e\+09 GB, .* GB are free; free some"):
        require_space(tmp_path, 10**18, what="it", remedy="free some")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_takes_nothing_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(RunError, match=r"cannot be written to \(Read-only file system\); free"):
        require_space(tmp_path, 1, what="it", remedy="free some")


def test_a_shortened_list_of_checksums_is_a_flaw(tmp_path):
    write(hidden(tmp_path / "x"), a="one", b="two")
    commit(hidden(tmp_path / "x"), tmp_path / "x")
    path = tmp_path / "x" / CHECKSUMS
    lines = path.read_text().splitlines(keepends=True)
    for some in (lines[:1], lines[:2], lines[1:], lines[::2]):
        path.write_text("".join(some))
        assert flaw_of(tmp_path / "x") == f"its {CHECKSUMS} is not whole"


def test_what_cannot_be_read_is_a_flaw(tmp_path, monkeypatch):
    write(hidden(tmp_path / "x"), a="one")
    commit(hidden(tmp_path / "x"), tmp_path / "x")

    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rlhf.disk.sha256_of", broken)
    assert flaw_of(tmp_path / "x") == "it cannot be read (Input/output error)"


def test_names_that_are_not_utf8_can_be_noted(tmp_path):
    replace_record(tmp_path / "run.json", {"path": "d\udcff"})
    assert read_record(tmp_path / "run.json") == {"path": "d\udcff"}


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    lock = Lock(tmp_path, flag="--x")
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(told, b"here")
        signal.pause()
    os.read(ready, 4)
    with pytest.raises(InputError):
        require_unlocked(tmp_path, flag="--x")
    os.close(lock.descriptor)  # as the end of this process would
    lock.descriptor = -1
    try:
        require_unlocked(tmp_path, flag="--x")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_text_takes_the_place_of_an_older_one_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.md"
    replace_text(path, "one")
    monkeypatch.setattr(disk, "sync_tree", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_text(path, "two")
    assert path.read_text() == "one"
    monkeypatch.undo()
    replace_text(path, "a name that is none: \udcff")
    assert path.read_text() == r"a name that is none: \udcff"
