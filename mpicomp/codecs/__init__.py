"""Codecs: pure pairs of functions between an array and a payload."""

from __future__ import annotations

from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.codecs.bounded import Bounded
from mpicomp.codecs.cast import Cast
from mpicomp.codecs.floats import FP8, MXFP4, MXFP8, Natural
from mpicomp.codecs.quantize import QSGD, DoReFa, Uniform
from mpicomp.codecs.randomk import RandomK
from mpicomp.codecs.rotation import Rotated
from mpicomp.codecs.sign import Sign, Ternary
from mpicomp.codecs.threshold import SampledTopK, Threshold
from mpicomp.codecs.topk import BlockTopK, TopK

CODECS: dict[str, type] = {
    "rotated": Rotated,
    "bounded": Bounded,
    "cast": Cast,
    "topk": TopK,
    "blocktopk": BlockTopK,
    "sampled_topk": SampledTopK,
    "threshold": Threshold,
    "randomk": RandomK,
    "uniform": Uniform,
    "qsgd": QSGD,
    "dorefa": DoReFa,
    "sign": Sign,
    "ternary": Ternary,
    "natural": Natural,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "fp8": FP8,
}
"""Every codec by the name that a spec gives it."""

__all__ = [
    "CODECS",
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
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
    "Uniform",
    "stream_of",
]
