"""FILES: where rows come from: a local path or the Hugging Face Hub, as .json, .jsonl or .parquet.

The raw files are read, since `datasets.load_dataset` wants one schema for all rows, which one score
of another type or one lone surrogate breaks.
"""

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf.errors import InputError

ULTRAFEEDBACK = "openbmb/UltraFeedback"
REPAIRED_REVISION = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"  # many a score of 10 was a 1 before
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
HUB_TIMEOUT = 10  # seconds


def find_files(dataset: str, revision: str | None) -> tuple[Path, list[Path]]:
    """Return the folder of a data set and the files in it, sorted, without hidden ones.

    `dataset` is a local file or folder, or else an id on the Hub, fetched at `revision` (None: the
    one with repaired scores for UltraFeedback, the newest for others).

    Raises: InputError if there is no data file, or the Hub does not give the data set.
    """
    path = Path(dataset)
    if not path.exists():
        pinned = REPAIRED_REVISION if dataset == ULTRAFEEDBACK else None
        path = download(dataset, revision or pinned)
    folder = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.name.lower().endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"--dataset={dataset}: no file there ends in {', '.join(SUFFIXES)}")
    return folder, files


def download(dataset: str, revision: str | None) -> Path:
    """Fetch a Hub data set's files into the cache; return their folder, named by its revision.

    What is in the cache serves without the Hub.

    Raises: InputError if neither the Hub nor the cache gives them.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    unreachable = hub_failure(
        lambda: HfApi().dataset_info(dataset, revision=revision, timeout=HUB_TIMEOUT)
    )
    try:
        folder = snapshot_download(
            dataset,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
            local_files_only=unreachable is not None,
        )
    except (EntryNotFoundError, HTTPError, OSError, ValueError) as error:
        cause = unreachable or error
        raise InputError(
            f"--dataset={dataset}: neither a file nor a folder here, nor given by the Hugging Face "
            f"Hub at revision {revision or 'main'} ({type(cause).__name__}: {str(cause)[:200]}); "
            f"without the Hub, give a local .jsonl, .json or .parquet file"
        ) from cause
    return Path(folder)


def hub_failure(ask: Callable[[], object]) -> Exception | None:
    """Ask the Hub something; return why it did not answer, or None.

    A download alone waits minutes for a Hub that does not answer.
    """
    from huggingface_hub.errors import HTTPError

    try:
        ask()
    except (HTTPError, OSError, ValueError) as error:
        return error
    return None


def read_rows(path: Path, *, flag: str = "--dataset") -> Iterator[object]:
    """Yield the rows of a file one by one; None stands for a line that is not JSON.

    A .json file may hold a list, an object around one list, or an object on each line.

    Raises: InputError if the file as a whole is damaged.
    """
    try:
        if path.name.lower().endswith(".parquet"):
            yield from _read_parquet(path, flag)
            return
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if gzipped else path.open("rb") as lines:
            if path.name.lower().endswith((".json", ".json.gz")):
                value = _json_or_none(lines.read())
                if isinstance(value, dict) and len(value) == 1:
                    (value,) = value.values()
                if isinstance(value, list):
                    yield from value
                    return
                lines.seek(0)
            yield from (_json_or_none(line) for line in lines if line.strip())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{flag}: {path} is damaged ({error}): get it again") from error


def _read_parquet(path: Path, flag: str) -> Iterator[object]:
    import datasets  # takes a second, which other files need not wait
    import pyarrow

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would report is raised as well
    try:  # streaming makes no second copy on the disk
        yield from datasets.Dataset.from_parquet(glob.escape(str(path)), streaming=True)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise InputError(f"{flag}: {path} cannot be read as parquet ({error})") from error


def _json_or_none(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
