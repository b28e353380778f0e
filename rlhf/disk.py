"""DISK: what is written appears whole or not at all, and a folder in use has one writer.

Whatever matters is written under a hidden name, put onto the disk, and renamed. Such a name ends in
`.tmp`; what a killed process leaves of it is swept away by the next.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rlhf.errors import InputError, RunError

CHECKSUMS = "SHA256SUMS"  # as `sha256sum --check` reads them
LOCK = ".lock"
CARD = "README.md"  # has a checksum as well, but people may change it


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Put a file, or a folder with all that is in it, onto the disk."""
    for entry in [*path.rglob("*"), path]:
        sync_to_disk(entry)


def hidden(final: Path) -> Path:
    """Name what is to become `final`, while it is written."""
    return final.with_name(f".{final.name}.tmp")


def remove(path: Path) -> None:
    """Remove a folder, or a file; a folder is hidden first, so that none is seen half empty."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    if not path.name.endswith(".tmp"):
        path = path.rename(path.with_name(f".{path.name}.old.tmp"))
    shutil.rmtree(path)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder. Its lock must be held."""
    for leftover in folder.glob(".*.tmp"):
        remove(leftover)


def commit(temporary: Path, final: Path) -> None:
    """Give a finished file or folder its name, so that under this name it is always whole.

    A folder gets the SHA-256 of each of its files. If it stands there already, byte for byte, as
    it does when a step is done again after a crash, it stays.
    """
    umask = os.umask(0)
    os.umask(umask)
    if temporary.is_dir():
        told = write_checksums(temporary)
        if flaw_of(final, told=told) is None:
            shutil.rmtree(temporary)
            return
    for entry in [temporary, *temporary.rglob("*")]:
        if entry.is_file():
            entry.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    sync_tree(temporary)
    if final.is_dir():  # damaged, or of an update that rounds otherwise every time
        remove(final)
    os.replace(temporary, final)
    sync_to_disk(final.parent)


def link(path: Path, name: str) -> None:
    """Point a symlink at a name beside it; at every moment it points at one."""
    hidden(path).unlink(missing_ok=True)
    hidden(path).symlink_to(name)
    os.replace(hidden(path), path)
    sync_to_disk(path.parent)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path there."""
    names = (str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: sha256_of(folder / name) for name in names if name != CHECKSUMS}


def write_checksums(folder: Path) -> str:
    """Note in a folder what its files are now; returns the note, whose last line ends it."""
    lines = [f"{digest}  {name}" for name, digest in checksums(folder).items()]
    text = "\n".join([*lines, f"# {len(lines)} files"]) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")
    return text


def flaw_of(folder: Path, *, told: str | None = None) -> str | None:
    """Say what differs from a folder's checksums, or from those told; None if nothing does."""
    if told is None:
        try:
            told = (folder / CHECKSUMS).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return f"its {CHECKSUMS} cannot be read"
    lines = told.splitlines()
    if not lines or lines.pop() != f"# {len(lines)} files":
        return f"its {CHECKSUMS} is not whole"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    try:
        seen = checksums(folder) if folder.is_dir() else {}
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    for name, digest in expected.items():
        if Path(name).name == CARD:
            continue
        if name not in seen:
            return f"{name} is missing"
        if seen[name] != digest:
            return f"{name} has changed"
    return None


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON can't hold (nan, infinities) by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; what JSON can't hold becomes null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    # What UTF-8 has not, as in names of files that are none, JSON escapes in the same way.
    path.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a file in place of an older one: at every moment one of them is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    commit(hidden(path), path)


def replace_json(path: Path, value: Any) -> None:
    """Write a value as JSON in place of an older one, as `replace_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(hidden(path), value)
    commit(hidden(path), path)


def replace_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record that can be told from a damaged one, in place of an older one."""
    replace_json(path, {**record, "sha256": digest_of(record)})


def read_record(path: Path) -> dict[str, Any] | None:
    """Read what `replace_record` wrote; None if it is not as it was written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record.pop("sha256") == digest_of(record) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def take(descriptor: int) -> None:
    """Lock an open file, on disks that know locks. Raises: BlockingIOError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def require_unlocked(folder: Path, *, flag: str) -> None:
    """Stop if another process holds a folder's lock. Raises: InputError, naming the holder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        take(descriptor)
    except BlockingIOError as error:
        holder = os.read(descriptor, 300).decode(errors="replace").strip()
        raise InputError(
            f"{flag}={folder}: is in use by {holder or 'a process that just started'}; wait for it,"
            f" or name another {flag}"
        ) from error
    finally:
        os.close(descriptor)


class Lock:
    """A folder that this process alone writes to, until `release` or its end.

    The system lets go of the lock of a process that dies. Raises: InputError, naming the holder.
    """

    def __init__(self, folder: Path, *, flag: str) -> None:
        self.path = folder / LOCK
        while True:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                take(self.descriptor)
                if os.path.samestat(os.fstat(self.descriptor), self.path.stat()):
                    break
            except BlockingIOError:
                require_unlocked(folder, flag=flag)
            except FileNotFoundError:
                pass
            os.close(self.descriptor)  # its holder released and removed it in this moment
        try:
            os.truncate(self.descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.write(self.descriptor, holder.encode())
        except BaseException:  # a full disk: who has not got the lock cannot release it
            self.release()
            raise
        os.register_at_fork(after_in_child=self.forget)

    def release(self) -> None:
        """Let others use the folder."""
        self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Hold the lock no longer: a child that a process forks would hold it beyond its end."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def require_space(folder: Path, num_bytes: int, *, what: str, remedy: str) -> None:
    """Stop unless a folder's disk takes so many bytes more, and takes any at all.

    Raises: RunError.
    """
    probe = folder / ".probe.tmp"
    try:
        probe.write_bytes(b"\0" * 4096)
        sync_to_disk(probe)
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to ({error.strerror}); {remedy}") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunError(
            f"{folder}: {what} will take about {num_bytes / 1e9:.2g} GB, {free / 1e9:.2g} GB are"
            f" free; {remedy}"
        )
