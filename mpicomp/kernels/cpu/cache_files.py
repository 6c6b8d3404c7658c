"""Numba's files of compiled kernels, with a checksum: a damaged kernel never runs and is compiled anew.

An index (`.nbi`) says which data file (`.nbc`) holds a variant's machine code. Numba itself unpickles both unchecked:
a truncated file stops the program, and a changed byte in machine code runs. Here each file is

    checksum   16 bytes   BLAKE2b over the file's name and everything that follows
    sources     8 bytes   hash of the stamp of the sources and of Numba's version
    purpose     8 bytes   hash of the key: signature and processor
    contents              a pickle

A file with the right checksum and other hashes is out of date, and is written anew without a warning.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

CHECKSUM, HASH = 16, 8  # bytes
FORMAT = 1  # of these files; part of their names


class CheckedFiles:
    """The index and the data files of one kernel, in place of `known`, a Numba IndexDataCacheFile.

    `exclude` is called after a damaged file was found and before it is read once more: it waits for other processes
    that may be writing it anew. `damaged` maps each damaged file to the reason.
    """

    def __init__(self, known: Any, stamp: str) -> None:
        self._known, self._stamp = known, stamp
        self.damaged: dict[str, str] = {}
        self.exclude: Callable[[], None] = lambda: None

    def load(self, key: Any) -> Any:
        """Return the entry of `key`, None if there is none or it is damaged."""
        found = self._load(key)
        if found is None and self.damaged:
            self.exclude()
            found = self._load(key)
        return found

    def _load(self, key: Any) -> Any:
        name = self._load_index().get(key)
        return None if name is None else self._read(Path(self._known._data_path(name)), key)

    def save(self, key: Any, data: Any) -> None:
        """Store an entry; data first, so that an index never names a file that does not exist yet."""
        names = self._load_index()
        if key not in names:
            number = 1
            while self._known._data_name(number) in names.values():
                number += 1
            names[key] = self._known._data_name(number)
        self._write(Path(self._known._data_path(names[key])), key, data)
        self._save_index(names)

    def _load_index(self) -> dict[Any, str]:
        return cast("dict[Any, str]", self._read(Path(self._known._index_path), None) or {})

    def _save_index(self, names: dict[Any, str]) -> None:
        self._write(Path(self._known._index_path), None, names)

    def _read(self, path: Path, key: Any) -> Any:
        """Return the contents of a file for `key`, None if it is missing or damaged."""
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.damaged[str(path)] = error.strerror or str(error)
            return None
        body = contents[CHECKSUM:]
        if _hash(CHECKSUM, path.name.encode(), body) != contents[:CHECKSUM]:
            self.damaged[str(path)] = "its checksum is wrong"
            return None
        head = self._head(key)
        return pickle.loads(body[len(head) :]) if body.startswith(head) else None

    def _write(self, path: Path, key: Any, data: Any) -> None:
        body = self._head(key) + self._known._dump(data)
        with self._known._open_for_write(str(path)) as file:
            file.write(_hash(CHECKSUM, path.name.encode(), body) + body)

    def _head(self, key: Any) -> bytes:
        return _hash(HASH, repr((self._known._version, self._stamp)).encode()) + _hash(HASH, repr(key).encode())


def _hash(size: int, *parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
