"""What a reduction costs, what this machine can do, and so how long it will take.

`Cost` is what a reducer says of itself: one formula each, written beside the algorithm.
"""

from mpicomp.planner.cost import Cost, Work

__all__ = ["Cost", "Work"]
