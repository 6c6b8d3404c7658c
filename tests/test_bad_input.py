"""Bad input to the works on several ranks: an error on all or on none, nothing changed, and the next call works.

`REFUSALS` names for each kind of bad input the tests that show it on two ranks or more; some are here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from named_tests import gone
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError, WireFormatError
from mpicomp.federated import Federation, Network, Report, federation, linear, lossy
from mpicomp.federated.links import Bundle

HERE = "test_bad_input.py"

REFUSALS: dict[str, list[str]] = {
    "a truncated or altered model file": [
        f"{HERE}::test_a_damaged_model_file_is_refused_on_all_ranks_and_changes_no_model",
        "models/test_files.py::test_every_truncation_is_refused",
        "models/test_files.py::test_every_changed_byte_is_refused",
    ],
    "a frame of another model or codec": [
        "models/test_broadcast.py::test_a_model_that_does_not_fit_is_refused_on_all_ranks",
        "mpi/test_models.py::test_a_model_that_does_not_fit_is_refused_on_all_ranks",
        f"{HERE}::test_a_frame_of_another_codec_or_model_is_left_out_and_named_on_all_ranks",
        f"{HERE}::test_predictions_by_another_codec_are_refused_on_all_ranks",
    ],
    "a sub-model that does not fit": [
        "federated/test_rounds.py::test_a_client_that_fails_is_left_out_and_named",
        "federated/test_rounds.py::test_bad_arguments_are_refused_on_all_ranks",
    ],
    "a mask that differs between ranks": [
        "reducers/test_masked.py::test_masks_that_differ_are_an_error_on_all_ranks",
        "models/test_schedule.py::test_masks_that_differ_are_an_error_on_all_ranks",
        "mpi/test_masks.py::test_masks_that_differ_are_an_error_on_all_ranks_and_change_nothing",
    ],
    "a schedule that never reaches its end": [
        "models/test_schedule.py::test_a_schedule_that_never_reaches_its_end_is_refused",
        f"{HERE}::test_schedules_that_differ_are_an_error_on_all_ranks_and_change_no_mask",
        "mpi/test_masks.py::test_schedules_that_differ_are_an_error_on_all_ranks",
    ],
    "a budget above the number of atoms": [
        "reducers/test_spectral.py::"
        "test_a_budget_above_the_number_of_atoms_is_refused_on_all_ranks_and_the_next_call_works",
        f"{HERE}::test_a_method_that_one_rank_cannot_use_is_refused_on_all_and_a_memory_stays",
    ],
    "densities that do not descend": [
        "mpi/test_dgc.py::test_bad_settings_are_refused_on_all_ranks",
        f"{HERE}::test_a_method_that_one_rank_cannot_use_is_refused_on_all_and_a_memory_stays",
    ],
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_every_kind_of_bad_input_has_its_test(kind: str) -> None:
    assert not gone(REFUSALS[kind]), "these tests are gone: say in REFUSALS which there are"


# ------------------------------------------------------------------------------------------------------ model files


def small(seed: int, width: int = 12) -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(9, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))


def content(model: Any) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda file: file[:-20], WireFormatError, "claims"),
        (lambda file: file[:90] + bytes([file[90] ^ 4]) + file[91:], WireFormatError, "cut or changed"),
        (lambda file: None, ValueError, "of another model"),
    ],
    ids=["cut", "changed", "of another model"],
)
def test_a_damaged_model_file_is_refused_on_all_ranks_and_changes_no_model(
    damage: Any, error: type[Exception], words: str
) -> None:
    """Rank 0 sends what it has read; each rank checks all of it before it writes to its model."""
    from mpicomp.models import bcast, compress_model, decompress_model

    models = [small(seed) for seed in range(3)]
    file = compress_model(small(7))
    bad = damage(file) or compress_model(small(7, width=13))
    before = [content(model) for model in models]

    def f(comm: Comm) -> None:
        length = mpicomp.bcast(comm, np.array([len(bad)]), "dense")
        read = np.frombuffer(bad, np.uint8) if comm.rank == 0 else np.empty(int(length[0]), np.uint8)
        found = mpicomp.bcast(comm, read, "dense").tobytes()
        with pytest.raises(error, match=words):
            decompress_model(found, into=models[comm.rank])
        assert content(models[comm.rank]) == before[comm.rank]
        bcast(comm, models[comm.rank])

    Team(3).run(f)
    assert all(content(model) == before[0] for model in models)


# -------------------------------------------------------------------------------------------------- federated rounds

SHAPES: dict[str, tuple[int, ...]] = {"0.weight": (24, 6), "0.bias": (24,), "2.weight": (3, 24), "2.bias": (3,)}
OTHER: dict[str, tuple[int, ...]] = {**SHAPES, "0.weight": (24, 7)}


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("bits", "shapes"), [(3, SHAPES), (2, OTHER)], ids=["codec", "model"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_frame_of_another_codec_or_model_is_left_out_and_named_on_all_ranks(
    ranks: int, bits: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    def begun(comm: Comm) -> Federation:
        made: Federation = federation(
            comm, Network([linear("0"), linear("2")], SHAPES), zeros(SHAPES), [1, 2, 3, 4], up=lossy(2), divisor="all"
        )
        return made

    def train(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        return {name: each + np.float32(client + 1) for name, each in given.items()}

    def run(comm: Comm, wrong: bool) -> tuple[Report, dict[str, Array]]:
        made = begun(comm)

        def channel(client: int, message: bytes) -> bytes | None:
            if client != 2:
                return message
            other = Bundle(lossy(bits), shapes, "float32", "federated, up")
            return other.encode(zeros(shapes), made.key(client, 1)) if wrong else None

        report = made.round(train, channel=channel)
        return report, made.publish()

    refused, lost = (Team(ranks).run(lambda comm, wrong=wrong: run(comm, wrong)) for wrong in (True, False))
    for (report, found), (_, expected) in zip(refused, lost, strict=True):
        assert report == refused[0][0]
        assert report.averaged == (0, 1, 3)
        assert report.left_out[2].startswith("its message was refused: ")
        assert all(found[name].tobytes() == expected[name].tobytes() for name in SHAPES)


# -------------------------------------------------------------------------------------------------- plain collectives


def test_predictions_by_another_codec_are_refused_on_all_ranks() -> None:
    torch = pytest.importorskip("torch")
    from mpicomp.models import Codistillation

    def f(comm: Comm) -> bool:
        with pytest.raises(ConfigMismatchError, match="ranks 0, 2: "):
            Codistillation(comm, "fp8" if comm.rank == 1 else "uniform(bits=4)").targets(torch.zeros(5, 4))
        return bool(Codistillation(comm).targets(torch.zeros(5, 4)).isfinite().all())

    assert all(Team(3).run(f))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("warmup(error_feedback(gather(topk(density=0.01))), densities=(0.1, 0.5), steps=2)", "densities must descend"),
        ("spectral(rank=9)", "rank must be at most the number of atoms, 4"),
        ("gather(atomo(density=1.5))", "density must be in"),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_method_that_one_rank_cannot_use_is_refused_on_all_and_a_memory_stays(
    ranks: int, spec: str, words: str
) -> None:
    good = "error_feedback(gather(topk(density=0.1)))"

    def f(comm: Comm, disturbed: bool) -> list[bytes]:
        x = np.random.default_rng(comm.rank).standard_normal((4, 50)).astype(np.float32)
        memory, found = mpicomp.memory(good, x), []
        for _ in range(2):
            found.append(mpicomp.allreduce(comm, x, good, memory=memory).tobytes())
            if disturbed:
                with pytest.raises(ValueError if comm.rank == 1 else ConfigMismatchError, match=words):
                    mpicomp.allreduce(comm, x, spec if comm.rank == 1 else "dense")
        return found

    clean, disturbed = (Team(ranks).run(lambda comm, bad=bad: f(comm, bad)) for bad in (False, True))
    assert disturbed == clean


def test_schedules_that_differ_are_an_error_on_all_ranks_and_change_no_mask() -> None:
    """Rank 1 prunes every 3 steps, the others every 2: at step 4 these compare masks, and it sums the next gradient.

    A schedule without an end is refused where it is made, before anything is sent.
    """
    torch = pytest.importorskip("torch")
    from mpicomp.models import Masks, Pruning, PruningSchedule

    models = [small(0) for _ in range(3)]

    def f(comm: Comm) -> tuple[Any, ...]:
        model, every = models[comm.rank], 3 if comm.rank == 1 else 2
        with pytest.raises(ValueError, match="never reaches sparsity"):
            PruningSchedule(final=0.9, start=2, end=9, every=every + 3)
        schedule = PruningSchedule(initial=0.3, final=0.9, start=2, end=8, every=every)

        def share(masks: Masks) -> Masks:
            masks.check(comm)
            return masks

        pruning = Pruning(model, schedule, share)

        def train() -> None:
            while pruning.step < 6:
                total = mpicomp.allreduce(comm, np.full(9, 0.5, np.float32), "dense")
                with torch.no_grad():
                    model[0].weight.add_(torch.from_numpy(total))
                pruning.update()

        with pytest.raises(ConfigMismatchError, match="ranks 0, 2: check of Masks"):
            train()
        pruning.masks.check(comm)  # they are as after step 2, on all ranks
        assert pruning.masks.sparsity == pytest.approx(0.3, abs=0.01)
        pruning.masks.apply(model)
        return pruning.step, pruning.masks.digest(), *content(model)

    assert len(set(Team(3).run(f))) == 1
