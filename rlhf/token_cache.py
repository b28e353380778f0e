"""Ids of texts that were tokenised before, kept beside the data.

A cache is found by what its ids depend on, the texts and the whole tokenizer, never by a file's
name or date. So nothing has to be invalidated: other texts have another cache.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

FOLDER = ".tokens"  # in the data's folder
LEAST_TEXTS = 1000  # fewer are tokenised in no time
MOST_FILES = 8  # of the newest; a stage needs up to six
FORMAT = "1"  # of the files, and of how texts are tokenised


def cached_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    data_dir: str | Path | None,
    *,
    kind: str = "text",
) -> list[list[int]]:
    """Return what `encode` makes of the texts, from the cache if it has done so before.

    `kind` names what else its ids depend on.
    A folder that cannot be written to leaves things as they are: the next run tokenises again.
    """
    if data_dir is None or len(texts) < LEAST_TEXTS:
        return encode(texts)
    path = Path(data_dir) / FOLDER / f"{key_of(tokenizer, texts, kind)}.safetensors"
    ids = read_ids(path)
    if ids is None:
        ids = encode(texts)
        with suppress(OSError, SafetensorError):
            write_ids(path, ids)
    return ids


def key_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], kind: str = "text") -> str:
    """Name everything that ids depend on."""
    key = hashlib.sha256(FORMAT.encode())
    for text in (kind, tokenizer.backend_tokenizer.to_str(), *texts):
        data = text.encode("utf-8", "surrogatepass")
        key.update(len(data).to_bytes(8, "big"))
        key.update(data)
    return key.hexdigest()


def digest(flat: np.ndarray, lengths: np.ndarray) -> str:
    """Return the SHA-256 of a cache's content."""
    return hashlib.sha256(flat.tobytes() + lengths.tobytes()).hexdigest()


def read_ids(path: Path) -> list[list[int]] | None:
    """Read a cache; None if there is none, or it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            flat, lengths = file.get_tensor("ids"), file.get_tensor("lengths")
            told = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if told != digest(flat, lengths) or (flat.dtype, lengths.dtype) != (np.int32, np.int64):
        return None
    with suppress(OSError):
        os.utime(path)  # so that what is in use is not the oldest
    flat_ids, ends = flat.tolist(), lengths.cumsum().tolist()
    return [
        flat_ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)
    ]


def write_ids(path: Path, ids: list[list[int]]) -> None:
    """Write a cache, whole or not at all, and remove the oldest ones."""
    path.parent.mkdir(exist_ok=True)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        content: dict[str, np.ndarray] = {"ids": flat, "lengths": lengths}
        save_file(content, temporary, metadata={"sha256": digest(flat, lengths)})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    caches = sorted(path.parent.glob("*.safetensors"), key=lambda cache: cache.stat().st_mtime_ns)
    for cache in caches[:-MOST_FILES]:
        cache.unlink(missing_ok=True)
