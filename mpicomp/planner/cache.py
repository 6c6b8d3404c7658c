"""Stores measurements: in the process for each communicator, and in a file for each topology.

Only rank 0 reads and writes files. A file that cannot be used gives a warning, and the machine is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from mpicomp import __version__
from mpicomp.comm.communicator import Comm
from mpicomp.comm.info import mpi_library
from mpicomp.comm.primitives import allgather
from mpicomp.comm.share import shared
from mpicomp.cost import Cost
from mpicomp.environment import setting
from mpicomp.planner.machine import Machine
from mpicomp.planner.measure import measure, measure_passes

FORMAT = 1

_known: WeakKeyDictionary[Comm, Machine] = WeakKeyDictionary()
_asked: WeakSet[Comm] = WeakSet()  # whose file was read


def machine_for(comm: Comm, costs: Sequence[Cost] = (), fresh: bool = False) -> Machine:
    """Return the machine of this communicator, with the time of every pass in the costs.

    It is that of this process, else that of the cache, else it is measured; with `fresh` it is measured in any case.
    Collective: all ranks give costs with the same passes, and get the same machine.
    """
    machine = None if fresh else _known.get(comm) or _stored(comm)
    if machine is None:
        machine = measure(comm)
        _keep(comm, machine)
    if missing := machine.missing(costs):
        machine = measure_passes(comm, machine, missing)
        _keep(comm, machine)
    _known[comm] = machine
    return machine


def known(comm: Comm) -> Machine | None:
    """Return the machine of a communicator if this process knows it; communicates nothing."""
    return _known.get(comm)


def recall(comm: Comm) -> Machine | None:
    """Return what is known of a communicator's machine, from this process or a file; measures nothing. Collective."""
    if comm not in _known and comm not in _asked and comm.size > 1:
        _asked.add(comm)
        if (found := _stored(comm)) is not None:
            _known[comm] = found
    return _known.get(comm)


def know(comm: Comm, machine: Machine) -> None:
    """Set the machine of a communicator in this process; all ranks must do so."""
    _known[comm] = machine


def folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of the files: MPICOMP_CACHE_DIR, or `mpicomp` in XDG_CACHE_HOME or in ~/.cache."""
    if own := setting("MPICOMP_CACHE_DIR", environ):
        return Path(own)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mpicomp")


def _key(comm: Comm) -> dict[str, str]:
    """Return all that times depend on: hosts, as a hash, the ranks on each, MPI and this library. Collective."""
    name = hashlib.blake2b(platform.node().encode(), digest_size=8).digest()
    names = [np.empty(8, np.uint8) for _ in range(comm.size)]
    allgather(comm, np.frombuffer(name, np.uint8).copy(), names, "names of hosts")
    hosts = hashlib.blake2b(b"".join(part.tobytes() for part in names), digest_size=8).hexdigest()
    return {"hosts": hosts, "topology": repr(comm.topology.nodes), "mpi": mpi_library(), "mpicomp": __version__}


def _stored(comm: Comm) -> Machine | None:
    """Return the machine in rank 0's file, None if there is none. Collective."""
    key = _key(comm)
    found = shared(comm, _read(key) if comm.rank == 0 else None)
    return None if found is None else Machine.from_json(found)


def _file(key: Mapping[str, str]) -> Path:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder(os.environ) / f"machine-{digest}.json"


def _read(key: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the checked content of a file; None if there is no file, and with a warning if it cannot be used."""
    path = _file(key)
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != dict(key):
            raise ValueError("it belongs to another machine, or to another version of mpicomp")
        return Machine.from_json(data["machine"]).to_json()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"mpicomp measures this machine again, since {path} cannot be used: {error}", stacklevel=2)
        return None


def _keep(comm: Comm, machine: Machine) -> None:
    """Replace the file, on rank 0 only; readers see the old one or the new one."""
    key = _key(comm)
    if comm.rank:
        return
    path = _file(key)
    text = json.dumps({"format": FORMAT, "key": key, "machine": machine.to_json()}, indent=1)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"mpicomp measures this machine in every job, since its cache cannot be written: {error}", stacklevel=2
        )
        with contextlib.suppress(OSError):
            os.unlink(temporary)
