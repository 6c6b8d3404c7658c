"""Every kernel compiles for every architecture, with the options that it is launched with."""

from __future__ import annotations

import pytest

from mpicomp.kernels.gpu.launch import C_TYPES, FOLDER, OPTIONS, Source

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

pytestmark = pytest.mark.nvrtc

CAPABILITIES = ("75", "80", "86", "90", "100")


def written_by(call, program, nbytes):
    """What NVRTC writes into an object of so many bytes.

    It must be nobody else's: Python shares one object for each single byte, and an empty log, a 0, written into
    `b" " * 1` was every b" " of the process from then on. `bytes(1)` is a new one.
    """
    room = bytes(nbytes)
    (error,) = call(program, room)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    return room


def compiled(text: str, capability: str) -> bytes:
    """Machine code for one architecture."""
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    options = [*OPTIONS, f"--gpu-architecture=sm_{capability}", "-Werror=all-warnings", "-diag-suppress=177"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = written_by(nvrtc.nvrtcGetProgramLog, program, nvrtc.nvrtcGetProgramLogSize(program)[1])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    code = written_by(nvrtc.nvrtcGetCUBIN, program, nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcDestroyProgram(program)
    return code


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", Source.known, ids=lambda source: source.name)
def test_every_source_compiles(source, capability):
    for work in C_TYPES.values():
        code = compiled(source.text(work), capability)
        assert code.startswith(b"\x7fELF")


def test_every_file_has_its_source():
    assert {path.stem for path in FOLDER.glob("*.cu")} == {source.name for source in Source.known}


def test_compiling_changes_no_byte_of_python():
    compiled('extern "C" __global__ void k(float* x) { *x = 1; }', "80")
    assert [bytes(range(256))[i : i + 1][0] for i in range(256)] == list(range(256))


def test_an_error_is_found():
    with pytest.raises(AssertionError, match='identifier "nothing" is undefined'):
        compiled('extern "C" __global__ void k(float* x) { *x = nothing; }', "80")
