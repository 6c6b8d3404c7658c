"""The kernels for CuPy arrays: CUDA by CuPy's RawModule, on the current stream. Importing this needs no CuPy."""

from mpicomp.kernels.gpu.sums import axpy

__all__ = ["axpy"]
