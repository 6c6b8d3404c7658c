"""Codecs: pure pairs of functions between an array and a payload."""

from __future__ import annotations

from mpicomp.codecs.base import Codec, Key, stream_of
from mpicomp.codecs.cast import Cast
from mpicomp.codecs.quantize import Sign, Uniform
from mpicomp.codecs.sparse import RandomK, TopK

CODECS: dict[str, type] = {
    "cast": Cast,
    "topk": TopK,
    "randomk": RandomK,
    "uniform": Uniform,
    "sign": Sign,
}
"""Every codec by the name that a spec gives it."""

__all__ = ["CODECS", "Codec", "Key", "stream_of", "Cast", "RandomK", "Sign", "TopK", "Uniform"]
