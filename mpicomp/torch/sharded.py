"""Reads a hook's state, with the places of all ranks, from a checkpoint of torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

RANKS = "ranks"
Path = tuple[Any, ...]


def saved_state(checkpoint: str | os.PathLike[str], name: str = "hook") -> dict[str, Any]:
    """Return what a hook remembered on all ranks, from a folder that torch.distributed.checkpoint has written.

        hook.load_state_dict(mpicomp.torch.saved_state("step1000"), strict=False)    # on another number of ranks

    `name` says where the hook's state is in the checkpoint: "hook" in `dcp.save({"hook": hook}, ...)`, and
    "optimizer.param_groups.0.exchange" where a DGCSGD was saved as "optimizer". The entry of a rank is read when it is
    looked at, so a hook that loads this reads what it needs. Not collective: every rank calls it, and reads for itself.

    ValueError where the checkpoint has no such state.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    paths: dict[str, Path] = metadata.planner_data or {key: (key,) for key in metadata.state_dict_metadata}
    inside = {key: path for key, whole in paths.items() if (path := _below(whole, name))}
    if not any(path[0] == RANKS for path in inside.values()):
        known = ", ".join(sorted({str(path[0]) for path in paths.values()}))
        raise ValueError(f"the checkpoint {os.fspath(checkpoint)!r} has no state of a hook as {name!r}, but {known}")
    shared = {key: path for key, path in inside.items() if path[0] != RANKS}
    return {**_read(reader, metadata, shared), RANKS: _Ranks(reader, metadata, inside)}


class _Ranks(Mapping[str, Any]):
    """The entries of all ranks, each read when it is looked at."""

    def __init__(self, reader: Any, metadata: Any, paths: Mapping[str, Path]) -> None:
        self._reader, self._metadata = reader, metadata
        self._paths: dict[str, dict[str, Path]] = {}
        for key, path in paths.items():
            if path[0] == RANKS:
                self._paths.setdefault(path[1], {})[key] = path[2:]

    def __getitem__(self, rank: str) -> dict[str, Any]:
        return _read(self._reader, self._metadata, self._paths[rank])

    def __contains__(self, rank: object) -> bool:
        return rank in self._paths  # without reading

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _below(path: Path, name: str) -> Path:
    """Return the part of a path below a name, whose parts may hold dots; empty where it is not below it."""
    for depth in range(1, len(path)):
        if ".".join(map(str, path[:depth])) == name:
            return path[depth:]
    return ()


def _read(reader: Any, metadata: Any, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Read the values of some keys, as a dict of dicts that their paths say."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    values: dict[str, Any] = {}
    for key in paths:
        kind = metadata.state_dict_metadata[key]
        tensor = isinstance(kind, TensorStorageMetadata)
        values[key] = torch.empty(kind.size, dtype=kind.properties.dtype) if tensor else None
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(values, storage_reader=reader, planner=planner, no_dist=True)
    found: dict[str, Any] = {}
    for key, path in paths.items():
        inner = found
        for part in path[:-1]:
            inner = cast(dict[str, Any], inner.setdefault(part, {}))
        inner[path[-1]] = values[key]
    return found
