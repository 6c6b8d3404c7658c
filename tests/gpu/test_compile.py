"""Every kernel compiles for every architecture, with the options that it is launched with."""

from __future__ import annotations

import pytest

from mpicomp.kernels import gpu
from mpicomp.kernels.gpu.launch import FOLDER, OPTIONS, Source

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

CAPABILITIES = ("75", "80", "86", "90", "100")


def compiled(text: str, capability: str) -> bytes:
    """Machine code for one architecture."""
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    options = [*OPTIONS, f"--gpu-architecture=sm_{capability}", "-Werror=all-warnings", "-diag-suppress=177"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    code = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", Source.known, ids=lambda source: source.name)
def test_every_source_compiles(source, capability):
    for macros in source.variants():
        code = compiled(source.text(macros), capability)
        assert code.startswith(b"\x7fELF")


def test_every_file_has_its_source():
    assert {path.stem for path in FOLDER.glob("*.cu")} == {source.name for source in Source.known}
    assert gpu.__all__


def test_an_error_is_found():
    with pytest.raises(AssertionError, match='identifier "nothing" is undefined'):
        compiled('extern "C" __global__ void k(float* x) { *x = nothing; }', "80")
