"""How kernels are compiled: once on a machine, on first use, for any processor the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpicomp.kernels.cpu import compile as compiling

ROOT = Path(__file__).parents[2]


def environment(cache, **more):
    return {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(code, cache, **more):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)


FEW = """
import json
import numpy as np
from mpicomp.kernels import cpu
from mpicomp.kernels.cpu.compile import counts
x = np.arange(5, dtype=np.float32)
cpu.divide(x.copy(), 3.0); cpu.axpy(x, x.copy()); cpu.narrow(x, None, None, np.empty(5, np.uint16), "bfloat16")
print(json.dumps(counts()))
"""

# Every kernel of every codec, in the widths that are packed differently.
SPECS = [
    "cast(dtype=fp16)",
    "cast(dtype=bf16)",
    "uniform(bits=4)",
    "uniform(bits=7, stochastic=True)",
    "uniform(bits=1)",
    "uniform(bits=1, stochastic=True)",
    "uniform(bits=2, minmax=True)",
    "qsgd",
    "dorefa",
    "sign",
    "sign(two_means=True)",
    "ternary(clip=2.5, scaled=False)",
    "natural",
    "mxfp4",
    "mxfp8",
    "fp8(format=e5m2)",
    "topk(density=0.01)",
    "topk(density=0.2, values=uniform(bits=3))",
    "blocktopk(density=0.05)",
    "sampled_topk(density=0.01)",
    "threshold(at=5.0)",
    "randomk(density=0.1)",
    "bounded(abs=0.01)",
    "bounded(rel=0.01)",
    "rotated(sign)",
    "rotated(uniform(bits=2, minmax=True, stochastic=True), kashin=True)",
]

BITS = """
import hashlib, json, sys
import numpy as np
from mpicomp.codecs import Key
from mpicomp.kernels import cpu
from mpicomp.registry import parse
found = {}
x = np.linspace(-3, 3, 5000).astype(np.float32) ** 3
for spec in SPECS:
    codec = parse(spec)
    payload = tuple(np.zeros(field.shape, field.dtype) for field in codec.fields(x.size, "float32"))
    new, out = np.empty_like(x), np.zeros_like(x)
    used = codec.encode_residual(x, x[::-1].copy(), payload, new, Key())
    payload = payload if codec.fixed else tuple(field[:used] for field in payload)
    codec.decode_add(payload, out, Key(), 0.3)
    digest = hashlib.blake2b()
    for field in (*payload, new, out):
        digest.update(field.tobytes())
    found[spec] = digest.hexdigest()
p, out = x[:4000].reshape(1000, 4).copy(), np.zeros((1000, 1000), np.float32)
cpu.outer_add(p, p, out, 0.3)
cpu.orthogonalise(p, 7)
found["low_rank"] = hashlib.blake2b(out.tobytes() + p.tobytes()).hexdigest()
print(json.dumps(found))
""".replace("in SPECS", f"in {SPECS!r}")


def test_importing_the_package_loads_no_compiler(tmp_path):
    code = "import json, sys, mpicomp, mpicomp.codecs, mpicomp.kernels; print(json.dumps('numba' in sys.modules))"
    assert result(start(code, tmp_path)) is False


@pytest.mark.slow
def test_processes_that_start_together_compile_each_kernel_once(tmp_path):
    counts = [result(process) for process in [start(FEW, tmp_path) for _ in range(4)]]
    assert sum(compiled for compiled, _ in counts) == 3
    assert all(compiled + loaded == 3 for compiled, loaded in counts)
    assert result(start(FEW, tmp_path)) == [0, 3]


@pytest.mark.slow
def test_a_killed_process_blocks_nobody(tmp_path):
    victim = start("from mpicomp.kernels.cpu import compile as c\n" + HOLD, tmp_path)
    assert victim.stdout.readline() == "held\n"
    waiting = start(FEW, tmp_path)
    time.sleep(1.0)
    assert waiting.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert result(waiting) == [3, 0]


HOLD = """
import numba, time
from mpicomp.kernels import cpu
from mpicomp.kernels.cpu import sums
divide = sums._divide
signature = divide._types("float32")
dispatcher = numba.njit(**c.OPTIONS)(divide._named(signature))
c._enable_caching(dispatcher)
with c._once(dispatcher):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_changed_source_is_compiled_anew(tmp_path):
    assert result(start(FEW, tmp_path)) == [3, 0]
    changed = "from mpicomp.kernels.cpu import compile as c\nc._stamp = lambda: 'other'\n" + FEW
    assert result(start(changed, tmp_path)) == [3, 0]
    assert result(start(changed, tmp_path)) == [0, 3]


def damage(path, how):
    """Damage a file of compiled code."""
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "random":
        data = bytearray(np.random.default_rng(0).bytes(len(data)))
    elif how == "unreadable":  # to root too
        path.unlink()
        path.mkdir()
        return
    elif how == "plain":  # as Numba writes it, without a checksum
        data = data[32:]
    else:  # one byte somewhere: in the head, the pickle, or the machine code
        data[int(how * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


REPORT = FEW.replace(
    "import json\n",
    "import json, warnings\nwarnings.simplefilter('always')\nsaid = []\n"
    "warnings.showwarning = lambda message, *_: said.append(str(message))\n",
    1,
).replace("print(json.dumps(counts()))", "print(json.dumps([*counts(), x.copy().tolist(), said]))")
assert "said.append" in REPORT
assert "said]" in REPORT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("nbi", "cut"),
        ("nbi", "empty"),
        ("nbi", 0.9),
        ("nbc", "random"),
        ("nbc", "plain"),
        *[("nbc", h) for h in (0.0, 0.5)],
    ],
)
def test_a_damaged_file_is_compiled_anew_and_named(tmp_path, suffix, how):
    assert result(start(FEW, tmp_path)) == [3, 0]
    (path,) = tmp_path.rglob(f"sums._divide-*.{suffix}")
    damage(path, how)
    processes = [start(REPORT, tmp_path) for _ in range(2)]
    found = [result(process) for process in processes]
    assert sum(compiled for compiled, *_ in found) == 1
    assert all(compiled + loaded == 3 for compiled, loaded, *_ in found)
    said = [message for *_, messages in found for message in messages]
    assert said
    assert all(str(path) in message and "damaged" in message for message in said)
    assert result(start(FEW, tmp_path)) == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_file_that_can_be_neither_read_nor_replaced_stops_nothing(tmp_path, suffix):
    assert result(start(FEW, tmp_path)) == [3, 0]
    (path,) = tmp_path.rglob(f"sums._divide-*.{suffix}")
    damage(path, "unreadable")
    for _ in range(2):
        compiled, loaded, _, said = result(start(REPORT, tmp_path))
        assert (compiled, loaded) == (1, 2)
        assert any(path.name in message for message in said)


@pytest.mark.slow
def test_machine_code_of_another_kernel_or_processor_is_not_run(tmp_path):
    assert result(start(FEW, tmp_path)) == [3, 0]
    (divide,) = tmp_path.rglob("sums._divide-*.nbc")
    (axpy,) = tmp_path.rglob("sums._axpy-*.nbc")
    divide.write_bytes(axpy.read_bytes())
    compiled, _, _, said = result(start(REPORT, tmp_path))
    assert compiled == 1
    assert str(divide) in said[0]
    other = start(FEW, tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert result(other) == [3, 0]
    index = next(tmp_path.rglob("sums._divide-*.nbi"))
    assert len(list(index.parent.glob(f"{index.stem}.*.nbc"))) == 2


NO_FOLDER = """
import numba
import numba.core.caching as caching
numba.config.CACHE_DIR = ""
provided = next(each for name, each in vars(caching).items() if name.endswith("UserProvidedCacheLocator"))
caching.CompileResultCacheImpl._locator_classes = [provided]
"""


@pytest.mark.slow
def test_without_a_folder_to_write_to_it_says_so_once_and_works(tmp_path):
    code = (
        NO_FOLDER
        + """
import warnings
from mpicomp.kernels.cpu import compile as c
c._own = lambda folder: False
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
"""
    )
    code += "\n".join("    " + line for line in FEW.strip().splitlines()[:-1])
    code += "\nprint(json.dumps([counts(), len(said), 'NUMBA_CACHE_DIR' in str(said[0].message), c.cache_path()]))"
    assert result(start(code, tmp_path)) == [[3, 0], 1, True, ""]


@pytest.mark.slow
def test_without_its_own_folder_it_uses_a_private_one_below_tmp(tmp_path):
    first = result(start(NO_FOLDER + FEW, "", TMPDIR=str(tmp_path)))
    second = result(start(NO_FOLDER + FEW, "", TMPDIR=str(tmp_path)))
    assert (first, second) == ([3, 0], [0, 3])
    (folder,) = tmp_path.glob("mpicomp-*")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    assert not compiling._own(folder)
    folder.chmod(0o700)
    assert compiling._own(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not compiling._own(tmp_path / "link")
    assert not compiling._own(tmp_path / "missing" / "deeper")


@pytest.mark.slow
@pytest.mark.deadline(900)
def test_results_do_not_depend_on_the_processor(tmp_path):
    processes = [start(BITS, tmp_path, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") for name in ("generic", "haswell")]
    namespace = {}
    exec(BITS.replace("print(", "digest_here = ("), namespace)
    expected = json.loads(namespace["digest_here"])
    for process in processes:
        assert result(process) == expected


def test_constants_of_kernels_are_numbers():
    helper = compiling.inline(lambda value: value)

    def kernel_of(constant):
        @compiling.kernel("T[]")
        def scaled(x):
            x[0] = constant

        return scaled

    assert kernel_of(3).name.endswith("scaled(3)")
    with pytest.raises(TypeError, match="must be numbers"):
        kernel_of(helper)


def test_what_does_not_fit_the_declaration_is_a_type_error():
    from mpicomp.kernels import cpu

    x = np.zeros(8, np.float32)
    with pytest.raises(TypeError, match="float32 or float64"):
        cpu.axpy(x.astype(np.int32), x)
    with pytest.raises(TypeError):
        cpu.axpy(x, x.astype(np.float64))
    with pytest.raises(TypeError):
        cpu.axpy(x[::2], x[:4])
    out = np.zeros(8, np.float32)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        cpu.axpy(x, out)


def test_counts_and_path():
    compiled, loaded = compiling.counts()
    assert compiled >= 0
    assert loaded >= 0
    assert Path(compiling.cache_path()).is_dir()
