"""What a reduction costs, what this machine can do, and so how long it will take.

`Cost` is what a reducer says of itself: one formula each, written beside the algorithm. `Machine` is measured, and
`predict` brings the two together.
"""

from mpicomp.planner.machine import Link, Machine, Point, Prediction, predict

__all__ = ["Link", "Machine", "Point", "Prediction", "predict"]
