"""What a hook does to each parameter, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.arrays import work_dtype
from mpicomp.comm.topology import Topology
from mpicomp.reducers import Dense, Layout, Reducer, Unit
from mpicomp.reducers.base import Level
from mpicomp.reducers.policies.base import Wrapper
from mpicomp.reducers.policies.branching import Branching
from mpicomp.reducers.policies.warmup import Warmup, codecs_with_density
from mpicomp.torch.parameters import SPARSE, Parameters, units_of
from mpicomp.torch.tensors import NAMES


@dataclass(frozen=True)
class Fate:
    """What happens to the gradient of a parameter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    nbytes: int | None
    """Sent by this rank in a step, by the cost of the parameter alone; an upper bound where sizes vary, None where
    nothing bounds it but the data, as with sparse gradients."""
    dense: int
    """Sent by this rank in an uncompressed allreduce."""


class Description(list[Fate]):
    """A parameter's fate each, in the order of the model; prints as a table."""

    def __init__(self, fates: list[Fate], resolved: str) -> None:
        super().__init__(fates)
        self.resolved = resolved

    def __str__(self) -> str:
        rows = [("parameter", "gradient", "bytes", "method")]
        for each in self:
            nbytes = "varies" if each.nbytes is None else f"{each.nbytes:,}"
            rows.append((each.name, f"{each.dtype} {list(each.shape)}", nbytes, each.method))
        a, b, c = (max(len(row[column]) for row in rows) for column in range(3))
        lines = [f"{name:<{a}}  {what:<{b}}  {nbytes:>{c}}  {method}" for name, what, nbytes, method in rows]
        sent = sum(each.nbytes for each in self if each.nbytes is not None)
        dense = sum(each.dense for each in self if each.nbytes is not None)
        times = f", {dense / sent:.3g} times fewer than the {dense:,} of an uncompressed allreduce" if sent else ""
        return "\n".join([*lines, f"{sent:,} bytes that a rank sends in a step{times}", f"by {self.resolved}"])

    __repr__ = __str__


def description(parameters: Parameters, reducer: Reducer, topology: Topology, me: int) -> Description:
    """Return what `reducer` does to each parameter of a model on rank `me`."""
    fates = []
    for name, parameter in parameters.items():
        (unit,) = units_of([name], [parameter])
        dtype, why = NAMES[parameter.dtype.to_real()], parameters.exact.get(name)
        found = Dense() if why else method_of(reducer, unit)
        size = unit.size * parameter.dtype.to_real().itemsize
        dense = 2 * size * (topology.size - 1) // topology.size
        cost = found.cost(Layout((unit,)), work_dtype(dtype), topology, me)
        nbytes = None if why == SPARSE else cost.nbytes
        method = f"exactly: {why}" if why else str(found)
        kind = str(parameter.dtype).removeprefix("torch.")
        fates.append(Fate(name, kind, tuple(parameter.shape), method, nbytes, dense))
    return Description(fates, str(reducer))


def method_of(reducer: Reducer, unit: Unit) -> Reducer:
    """Return the reducer of a unit: what is left of `reducer` without those that others go by."""
    if isinstance(reducer, Branching):
        method = reducer.methods[reducer.branch_of(unit)]
        assert isinstance(method, Reducer)
        return method_of(method, unit)
    if reducer.level is not Level.OUTER or not isinstance(reducer, Wrapper):
        return reducer
    inner = method_of(reducer.reducer, unit)
    if isinstance(reducer, Warmup) and not codecs_with_density(inner):  # it changes nothing there
        return inner
    return reducer.around(inner)
