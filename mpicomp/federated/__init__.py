"""Federated rounds over MPI: a server, many simulated clients per rank, sub-models, and lossy links both ways.

federation = federated.federation(comm, network, weights, clients=[n, ...], down=lossy(4), up=lossy(2), keep=0.75)
report = federation.round(train, participants=10)
"""

from mpicomp.federated.links import Link, lossy
from mpicomp.federated.report import Report
from mpicomp.federated.rounds import Federation, federation
from mpicomp.federated.submodels import Choice, Layer, Network, conv, flatten, layers_of, linear, norm

__all__ = ["Federation", "Report", "federation", "Link", "lossy"]
__all__ += ["Choice", "Layer", "Network", "conv", "flatten", "layers_of", "linear", "norm"]
