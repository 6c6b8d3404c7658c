"""Codecs: pure pairs of functions between an array and a payload. `mpicomp.registry` has the table of their names."""

from __future__ import annotations

from mpicomp.codecs.atomo import Atomo
from mpicomp.codecs.base import Codec, Key, Scope, stream_of
from mpicomp.codecs.bounded import Bounded
from mpicomp.codecs.cast import Cast
from mpicomp.codecs.floats import FP8, MXFP4, MXFP8, Natural
from mpicomp.codecs.quantize import QSGD, DoReFa, Uniform
from mpicomp.codecs.randomk import RandomK
from mpicomp.codecs.rotation import Rotated
from mpicomp.codecs.sign import Sign, Ternary
from mpicomp.codecs.threshold import SampledTopK, Threshold
from mpicomp.codecs.topk import BlockTopK, TopK

__all__ = [
    "Atomo",
    "BlockTopK",
    "Bounded",
    "Cast",
    "Codec",
    "DoReFa",
    "FP8",
    "Key",
    "MXFP4",
    "MXFP8",
    "Natural",
    "QSGD",
    "RandomK",
    "SampledTopK",
    "Rotated",
    "Scope",
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
    "Uniform",
    "stream_of",
]
