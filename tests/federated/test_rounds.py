"""Rounds over a team of threads: equal bits on any number of ranks, bytes, and clients that fail or send garbage."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.federated import Federation, Network, Report, federation, linear, lossy
from mpicomp.federated.mail import Letter
from mpicomp.frames import CHECKSUM, checksum

LAYERS = [linear("0"), linear("2"), linear("4")]
SHAPES = {
    "0.weight": (24, 6),
    "0.bias": (24,),
    "2.weight": (16, 24),
    "2.bias": (16,),
    "4.weight": (3, 16),
    "4.bias": (3,),
}
CLIENTS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
HARD: dict[str, Any] = {"down": lossy(4), "up": lossy(2), "keep": 0.75, "divisor": "covering"}


def weights(seed: int = 0, dtype: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def train(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
    """Move the weights by something that depends on all arguments; writes to what it gets."""
    rng = np.random.default_rng([client, number])
    for each in given.values():
        each *= each.dtype.type(0.9)
        each += 0.1 * rng.standard_normal(each.shape).astype(each.dtype)
    return given


def begun(comm: Comm, **how: Any) -> Federation:
    how = {"divisor": "all", "seed": 5, **how}
    values = how.pop("weights", weights())
    made: Federation = federation(comm, Network(LAYERS, SHAPES), values, how.pop("clients", CLIENTS), **how)
    return made


def course(
    ranks: int, rounds: int = 3, participants: int | None = 5, **how: Any
) -> tuple[dict[str, Array], list[Report]]:
    """Return the published weights and reports, after it is sure that all ranks have the same."""
    calls = {name: how.pop(name) for name in ("train", "channel") if name in how}

    def run(comm: Comm) -> tuple[dict[str, Array], list[Report]]:
        made = begun(comm, **how)
        reports = [
            made.round(calls.get("train", train), participants, channel=calls.get("channel")) for _ in range(rounds)
        ]
        assert (made.weights is None) == (comm.rank != 0)
        return made.publish(), reports

    (new, reports), *others = Team(ranks).run(run)
    for each, also in others:
        assert also == reports
        assert all(each[name].tobytes() == new[name].tobytes() for name in new)
    return new, reports


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("how", [{}, HARD, {**HARD, "differences": True}], ids=["dense", "hard", "differences"])
def test_the_bits_do_not_depend_on_the_number_of_ranks(how: dict[str, Any]) -> None:
    first, reports = course(1, **how)
    for ranks in (2, 3, 5, 13):
        new, also = course(ranks, **how)
        assert same(first, new)
        assert also == reports
    assert same(first, course(3, server_trains=False, **how)[0])
    assert not same(first, course(2, seed=6, **how)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dense_rounds_are_fedavg(dtype: str) -> None:
    """Weighted by examples; all clients have the whole network, so that both divisors are one."""
    expected, rest = weights(dtype=dtype), np.array(CLIENTS) / sum(CLIENTS)
    for number in range(2):
        trained = [
            train(client, number, {name: each.copy() for name, each in expected.items()}) for client in range(11)
        ]
        expected = {
            name: sum(share * each[name].astype(np.float64) for share, each in zip(rest, trained, strict=True)).astype(
                dtype
            )
            for name in expected
        }
    for divisor in ("all", "covering"):
        new, reports = course(3, 2, None, divisor=divisor, weights=weights(dtype=dtype))
        for name, each in expected.items():
            np.testing.assert_allclose(new[name], each, rtol=1e-5, atol=1e-6)
            assert new[name].dtype == dtype
        assert reports[0].averaged == reports[0].invited == tuple(range(11))


def test_participants_are_drawn_anew_without_favour() -> None:
    _, reports = course(2, 60, 5, clients=[1] * 11, train=lambda client, number, given: given)
    counts = np.zeros(11)
    for report in reports:
        assert len(set(report.invited)) == 5
        assert list(report.invited) == sorted(report.invited)
        counts[list(report.invited)] += 1
    assert len({report.invited for report in reports}) > 40
    assert counts.min() > 10


def test_bytes_are_those_of_the_frames_and_of_the_network() -> None:
    """What crosses to other ranks is the frames, with 24 bytes for each, and 8 bytes for each rank and way."""
    seen: list[int] = []

    def channel(client: int, message: bytes) -> bytes:
        seen.append(len(message))
        return message

    def run(comm: Comm) -> tuple[int, Report]:
        made = begun(comm, **HARD, server_trains=False)
        before = comm.traffic.counted
        report = made.round(train, 6, channel=channel)
        return comm.traffic.counted - before, report

    results = Team(3).run(run)
    report = results[0][1]
    assert results[0][0] == report.down_bytes + 6 * 24 + 2 * 8
    assert results[1][0] + results[2][0] == report.up_bytes + 6 * 24 + 2 * 8
    assert report.up_bytes == sum(seen)
    assert report.dense_bytes == 4 * sum(each.size for each in weights().values())
    assert report.down_ratio == 6 * report.dense_bytes / report.down_bytes
    assert report.up_ratio == 6 * report.dense_bytes / report.up_bytes


def test_a_client_gets_a_fresh_sub_model_of_one_shape() -> None:
    shapes, contents = set(), set()

    def look(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        shapes.add(tuple(each.shape for each in given.values()))
        contents.add(given["0.weight"].tobytes())
        return given

    course(2, 2, None, keep=0.5, train=look)
    assert shapes == {((12, 6), (12,), (8, 12), (8,), (3, 8), (3,))}
    assert len(contents) == 22


def test_the_server_keeps_its_weights_where_clients_change_nothing() -> None:
    new, _ = course(3, 2, **{**HARD, "down": "dense", "up": "dense"}, train=lambda client, number, given: given)
    assert same(new, weights())


def distance(differences: bool) -> float:
    """The mean squared distance between the server's weights and those with which clients start, 2 bits down."""

    def run(comm: Comm) -> float:
        made = begun(comm, down=lossy(2), differences=differences)
        made.round(train, 4)
        made.publish()
        made.round(train, 4)
        assert made.weights is not None
        exact, far = made.weights, list[float]()

        def look(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
            far.append(float(sum(np.square(each - exact[name]).sum() for name, each in given.items())))
            return given

        made.round(look, 4)
        return float(np.mean(far))

    return Team(1).run(run)[0]


def test_differences_need_fewer_bits() -> None:
    assert distance(differences=True) < 0.1 * distance(differences=False)


# ------------------------------------------------------------------------------------- clients that are left out


def test_a_client_that_fails_is_left_out_and_named() -> None:
    def failing(client: int, number: int, given: dict[str, Array]) -> Any:
        match client:
            case 2:
                raise RuntimeError("out of battery")
            case 3:
                return {name: each[..., :-1] for name, each in given.items()}
            case 4:
                return {**given, "0.bias": np.full_like(given["0.bias"], np.nan)}
            case 5:
                return {name: each.astype(np.float64) for name, each in given.items()}
            case 6:
                return None
        return train(client, number, given)

    healthy = [0, 1, 7, 8, 9, 10]
    for ranks in (1, 3):
        new, (report,) = course(ranks, 1, None, train=failing, **HARD)
        assert list(report.averaged) == healthy
        assert report.arrived == 6
        assert {client: reason.split(":")[0] for client, reason in report.left_out.items()} == {
            2: "RuntimeError",
            3: "ValueError",
            4: "ValueError",
            5: "TypeError",
            6: "TypeError",
        }
        assert "out of battery" in report.left_out[2]
        assert "of the sub-model is" in report.left_out[3]
        assert "client 4 left out: ValueError: 0.bias holds numbers that are not finite" in str(report)
        assert np.isfinite(new["0.weight"]).all()


def test_an_error_that_has_no_text_leaves_a_client_out() -> None:
    """What the user's code raises may itself fail: then, too, the other ranks hear of it."""

    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    def failing(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        if client == 1:
            raise SpeechlessError
        return given

    _, (report,) = course(3, 1, None, train=failing)
    assert report.left_out == {1: "SpeechlessError"}


Damage = Callable[[bytes], bytes | None]


def resealed(message: bytes, at: int, value: int) -> bytes:
    data = bytearray(message)
    data[at] = value
    data[-CHECKSUM:] = checksum(bytes(data[:-CHECKSUM]))
    return bytes(data)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "lost": (lambda message: None, "lost"),
    "empty": (lambda message: b"", "at least"),
    "cut": (lambda message: message[:-9], "claims"),
    "longer": (lambda message: message + b"x", "claims"),
    "noise": (lambda message: bytes(range(256)) * 9, "magic"),
    "a bit": (lambda message: message[:200] + bytes([message[200] ^ 1]) + message[201:], "checksum"),
    "another round": (lambda message: resealed(message, 40, 77), "another round, client or direction"),
    "another client": (lambda message: resealed(message, 64, 9), "another round, client or direction"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_garbage_is_left_out_and_named(damage: str) -> None:
    """The other clients count as if that one had not been invited."""
    change, words = DAMAGES[damage]

    def channel(client: int, message: bytes) -> bytes | None:
        return change(message) if client == 7 else message

    def absent(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        if client == 7:
            raise KeyError(client)
        return train(client, number, given)

    new, (report,) = course(3, 1, None, channel=channel, **HARD)
    assert report.averaged == tuple(client for client in range(11) if client != 7)
    assert words in report.left_out[7]
    assert same(new, course(2, 1, None, train=absent, **HARD)[0])


def test_a_message_of_an_earlier_round_is_refused() -> None:
    kept: dict[int, bytes] = {}

    def channel(client: int, message: bytes) -> bytes:
        return kept.setdefault(client, message)

    _, reports = course(1, 2, None, channel=channel)
    assert not reports[0].left_out
    assert len(reports[1].left_out) == 11
    assert reports[1].averaged == ()


def test_a_message_that_is_damaged_on_its_way_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not train on it."""
    honest = Federation.letters_down

    def damaged(self: Federation, participants: int | None) -> list[tuple[int, Letter]]:
        return [
            (rank, letter._replace(content=letter.content[:-1] + b"?") if letter.client == 3 else letter)
            for rank, letter in honest(self, participants)
        ]

    def look(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        assert client != 3
        return given

    monkeypatch.setattr(Federation, "letters_down", damaged)
    _, (report,) = course(2, 1, None, train=look, **HARD)
    assert report.left_out == {3: "WireFormatError: the checksum is wrong: the frame was cut or changed"}


def test_an_update_beyond_the_largest_number_is_left_out() -> None:
    def huge(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        return {name: np.full_like(each, 3.4e38 if client == 1 else 0.5) for name, each in given.items()}

    start = {name: np.full(shape, 3e38, np.float32) for name, shape in SHAPES.items()}
    new, (report,) = course(2, 1, 11, train=huge, weights=start)
    assert np.isfinite(new["0.weight"]).all()
    assert len(report.averaged) == 11  # 3.4e38 is a float32, and its mean with others too

    def beyond(client: int, message: bytes) -> bytes:
        """Send the update of client 1 as if it had been from weights near zero."""
        if client != 1:
            return message
        bundle, key = made[0].bundle(made[0].choice(1), 1), made[0].key(1, 1)
        return bundle.encode({name: np.full(shape, 3e38, np.float32) for name, shape in SHAPES.items()}, key)

    made: list[Federation] = []

    def run(comm: Comm) -> Report:
        made[:] = [begun(comm, weights=start)]
        return made[0].round(lambda client, number, given: given, channel=beyond)

    report = Team(1).run(run)[0]
    assert report.left_out == {1: "its update of 0.weight exceeds what float32 holds"}


def test_a_round_that_all_clients_leave_changes_nothing() -> None:
    def gone(client: int, number: int, given: dict[str, Array]) -> dict[str, Array]:
        raise OSError("gone")

    new, reports = course(3, 2, train=gone, **HARD)
    assert same(new, weights())
    assert [report.averaged for report in reports] == [(), ()]
    assert [len(report.left_out) for report in reports] == [5, 5]
    assert np.isnan(reports[0].up_ratio)


# ------------------------------------------------------------------------------------------- errors of all ranks


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"divisor": "some"}, "divisor must be one of all, covering"),
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": {"4": 0.5}}, "hidden layers only"),
        ({"down": "two_stage(uniform)"}, "reducer"),
        ({"up": "uniform(bits=0)"}, "bits"),
        ({"clients": []}, "at least one client"),
        ({"clients": [3, 0]}, "got 0 for client 1"),
        ({"clients": [3, 2.5]}, r"integers in 1\.\.2\^53, got 2\.5"),
        ({"clients": [float("inf")]}, "got inf for"),
        ({"clients": [True]}, "got True for"),
        ({"clients": [10**400]}, "got 1000"),
        ({"weights": None}, "weights must be arrays by name, got NoneType"),
        ({"weights": {**weights(), "0.bias": [0.0] * 24}}, r"must be NumPy arrays, got list for 0\.bias"),
        ({"weights": {**weights(), 5: np.zeros(3, np.float32)}}, "the network has no 5"),
        ({"seed": -1}, "seed"),
        ({"differences": 1}, "differences"),
        ({"weights": {**weights(), "0.bias": np.zeros(3, np.float32)}}, "shape"),
        ({"weights": {**weights(), "0.bias": np.zeros(24)}}, "all float32 or all float64"),
        ({"weights": {**weights(), "0.bias": np.full(24, np.inf, np.float32)}}, "not finite"),
    ],
)
def test_bad_arguments_are_refused_on_all_ranks(how: dict[str, Any], message: str) -> None:
    def run(comm: Comm) -> str:
        with pytest.raises((ValueError, TypeError, ConfigMismatchError)) as caught:
            begun(comm, **(how if comm.rank == 1 else {}))
        begun(comm).round(train, 2)  # and the communicator is whole
        return str(caught.value)

    found = Team(2).run(run)
    assert all(re.search(message, each) for each in found)


@pytest.mark.parametrize(
    "how", [{"keep": 0.5}, {"seed": 9}, {"up": lossy(3)}, {"divisor": "covering"}, {"clients": [1, 2]}]
)
def test_ranks_that_disagree(how: dict[str, Any]) -> None:
    def run(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError, match="rank 1"):
            begun(comm, **(how if comm.rank == 1 else {}))

    Team(3).run(run)


def test_ranks_whose_references_differ() -> None:
    """Other values on other ranks matter only with differences."""

    def run(comm: Comm) -> None:
        begun(comm, weights=weights(comm.rank)).round(train, 2)
        with pytest.raises(ConfigMismatchError, match="reference"):
            begun(comm, weights=weights(comm.rank), differences=True)

    Team(2).run(run)


def test_bad_rounds_are_refused_on_all_ranks_and_change_nothing() -> None:
    def run(comm: Comm) -> dict[str, Array]:
        made = begun(comm)
        for bad in (0, 12, 1.5, True):
            with pytest.raises((ValueError, ConfigMismatchError)):
                made.round(train, bad if comm.rank == 1 else 5)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ConfigMismatchError)):
            made.round(train if comm.rank else None, 5)  # type: ignore[arg-type]
        with pytest.raises(ConfigMismatchError):
            made.round(train, 3 + comm.rank)
        assert made.rounds == 0
        made.round(train, 5)
        return made.publish()

    assert same(Team(2).run(run)[0], course(1, 1)[0])


def test_export_and_restore() -> None:
    def run(comm: Comm) -> tuple[dict[str, Array], dict[str, Array]]:
        made = begun(comm, **HARD, differences=True)
        made.round(train, 5)
        made.publish("uniform(bits=8)")
        state = made.export()
        made.round(train, 5)
        again = begun(comm, **HARD, differences=True)
        again.restore(state)
        again.round(train, 5)
        with pytest.raises(ValueError, match="the state is of"):
            begun(comm).restore(state)
        wrong = [
            ({"reference": {}}, "of the network is missing"),
            ({"reference": None}, "weights must be arrays by name"),
            ({"reference": weights(dtype="float64")}, "all float32"),
            ({"round": None}, "round must be"),
        ]
        for change, message in wrong:
            with pytest.raises((ValueError, TypeError), match=message):
                again.restore({**state, **change})
        assert again.rounds == 2
        turned = {name: dict(reversed(state[name].items())) for name in ("reference", "weights")}
        last = begun(comm, **HARD, differences=True)
        last.restore({**state, **(turned if comm.rank else {})})  # the order of names in a file means nothing
        last.round(train, 5)
        assert same(last.publish(), again.publish())
        return made.publish(), again.publish()

    for one, other in Team(2).run(run):
        assert same(one, other)


def test_the_report_is_frozen_and_the_package_has_the_name() -> None:
    assert mpicomp.federated.federation is federation
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report(0, (), (), {}, 1, 0, 0, 4).round = 1  # type: ignore[misc]
