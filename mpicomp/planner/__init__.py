"""Predicts the time of a reduction from its cost and the measured speed of the machine.

Every reducer has a formula for its `Cost`, beside its algorithm. `Machine` is measured; `predict` combines the two.
"""

from mpicomp.planner.machine import Link, Machine, Point, Prediction, predict

__all__ = ["Link", "Machine", "Point", "Prediction", "predict"]
