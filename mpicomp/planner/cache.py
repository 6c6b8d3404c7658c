"""What was measured is kept: in the process for each communicator, and in a file for each topology.

Rank 0 alone touches files. A file that cannot be read, or that is about something else, is told of and measured anew.
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
from weakref import WeakKeyDictionary

import numpy as np

from mpicomp import __version__
from mpicomp.comm.collectives import allgather
from mpicomp.comm.communicator import Comm
from mpicomp.comm.info import mpi_library
from mpicomp.comm.share import shared
from mpicomp.cost import Cost
from mpicomp.environment import setting
from mpicomp.planner.machine import Machine
from mpicomp.planner.measure import measure, measure_passes

FORMAT = 1

_known: WeakKeyDictionary[Comm, Machine] = WeakKeyDictionary()


def machine_for(comm: Comm, costs: Sequence[Cost] = (), fresh: bool = False) -> Machine:
    """Return what is known of this communicator's machine, with the time of every pass that the costs name.

    From this process, else from the cache, else by measuring; `fresh` measures whatever is known. Collective: all
    ranks give costs with the same passes, and get the same.
    """
    machine = None if fresh else _known.get(comm)
    if machine is None:
        key = _key(comm)
        found = shared(comm, _read(key) if comm.rank == 0 and not fresh else None)
        machine = measure(comm) if found is None else Machine.from_json(found)
        if found is None:
            _keep(comm, machine)
    if missing := machine.missing(costs):
        machine = measure_passes(comm, machine, missing)
        _keep(comm, machine)
    _known[comm] = machine
    return machine


def known(comm: Comm) -> Machine | None:
    """What this process knows of a communicator's machine; communicates nothing."""
    return _known.get(comm)


def know(comm: Comm, machine: Machine) -> None:
    """Take this for what was measured, in this process; all ranks must do so."""
    _known[comm] = machine


def folder(environ: Mapping[str, str]) -> Path:
    """Where files are kept: MPICOMP_CACHE_DIR, or `mpicomp` in XDG_CACHE_HOME or in ~/.cache."""
    if own := setting("MPICOMP_CACHE_DIR", environ):
        return Path(own)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mpicomp")


def _key(comm: Comm) -> dict[str, str]:
    """What times depend on: hosts, as a hash, which ranks share them, MPI and this library. Collective."""
    name = hashlib.blake2b(platform.node().encode(), digest_size=8).digest()
    names = [np.empty(8, np.uint8) for _ in range(comm.size)]
    allgather(comm, np.frombuffer(name, np.uint8).copy(), names, "names of hosts")
    hosts = hashlib.blake2b(b"".join(part.tobytes() for part in names), digest_size=8).hexdigest()
    return {"hosts": hosts, "topology": repr(comm.topology.nodes), "mpi": mpi_library(), "mpicomp": __version__}


def _file(key: Mapping[str, str]) -> Path:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder(os.environ) / f"machine-{digest}.json"


def _read(key: Mapping[str, str]) -> dict[str, Any] | None:
    """The machine that a file holds, checked; None where there is none, or with a warning none that can be used."""
    path = _file(key)
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != dict(key):
            raise ValueError("it is about another machine, or of another version")
        return Machine.from_json(data["machine"]).to_json()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"mpicomp measures this machine anew, since {path} cannot be used: {error}", stacklevel=2)
        return None


def _keep(comm: Comm, machine: Machine) -> None:
    """Write the file anew, rank 0 alone; readers see the old one or the new one."""
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
        warnings.warn(f"mpicomp measures this machine in every job, since nothing can be kept: {error}", stacklevel=2)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
