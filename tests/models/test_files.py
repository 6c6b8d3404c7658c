"""Files of models: every state bit by bit, and bytes that are no file or one of another model."""

from __future__ import annotations

import copy
import time
import tracemalloc

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from mpicomp.errors import WireFormatError
from mpicomp.frames import CHECKSUM, checksum
from mpicomp.models import Codebooks, Masks, compress_model, decompress_model, directory
from mpicomp.models.state import DTYPES


def small(seed=0):
    """A model that is pruned and shared, with buffers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))
    net(torch.randn(16, 40))
    Masks.magnitude(net, 0.8).apply(net)
    Codebooks.fit(net, 4).apply(net)
    return net


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(some, others):
    return list(some) == list(others) and all(
        some[name].dtype == each.dtype and some[name].shape == each.shape and torch.equal(bits(some[name]), bits(each))
        for name, each in others.items()
    )


def test_the_column_of_one_row_is_one_element():
    column = torch.ones(1, 5)[:, 0]
    assert decompress_model(compress_model({"x": column}))["x"].tolist() == [1.0]


def entry(data):
    """The only tensor of a file."""
    (found,), _ = directory.read(memoryview(data), 1 << 40)
    return found


def patterned(dtype, shape, kinds):
    """A tensor with a few different values, zero most of the time."""
    size = int(np.prod(shape))
    pool = torch.randint(0, 2 if dtype == torch.bool else 256, (kinds, max(dtype.itemsize, 1)), dtype=torch.uint8)
    pool[0] = 0
    chosen = torch.randint(0, kinds, (size,)) * (torch.rand(size) < 0.2)
    return pool[chosen].contiguous().view(-1).view(dtype).reshape(shape)


Z = torch.complex(torch.arange(4.0), torch.ones(4))
STATES = {
    "shared": lambda: small().state_dict(),
    "trained": lambda: nn.Linear(64, 64).state_dict(),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 2, 2)),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 2, 32),
    "lstm": lambda: nn.LSTM(8, 8, 2),
    "nothing": dict,
    "no dimensions": lambda: {"a": torch.tensor(3.5), "b": torch.tensor(-7), "c": torch.tensor(True)},
    "empty": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2, dtype=torch.int64)},
    "zeros": lambda: {"a": torch.zeros(1000), "b": torch.zeros(7, 11, dtype=torch.int16)},
    "one value": lambda: {"a": torch.full((1000,), 0.1), "b": torch.ones(5, 5, dtype=torch.float64)},
    "one weight": lambda: {"a": torch.eye(100)[-1] * 3, "b": torch.eye(100)[0]},
    "odd numbers": lambda: {"a": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45] * 200)},
    "nan payloads": lambda: {"a": (torch.arange(900, dtype=torch.int32) % 3 + 0x7FC00001).view(torch.float32)},
    "strides": lambda: {"a": torch.randint(0, 3, (20, 30)).float().t(), "b": torch.arange(9.0)[::2]},
    "names": lambda: {"": torch.ones(2), "wäight.日本": torch.zeros(3), "a" * 5000: torch.ones(1)},
    "views": lambda: {
        "a": Z,
        "b": Z.conj(),
        "c": Z.conj().imag,
        "d": Z.imag,
        "e": Z[:2],
        "f": Z.view(2, 2),
    },
    "lazy": lambda: {"a": torch.complex(torch.arange(200.0) % 2, torch.ones(200)).conj()},
}


@pytest.mark.parametrize("name", STATES)
def test_round_trip(name):
    torch.manual_seed(0)
    model = STATES[name]()
    state = model.state_dict() if isinstance(model, nn.Module) else model
    plain = {k: v.resolve_conj().resolve_neg() for k, v in state.items()}
    assert same(decompress_model(compress_model(model)), plain)


@pytest.mark.parametrize("kinds", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, kinds):
    torch.manual_seed(0)
    state = {"w": patterned(dtype, (30, 40), kinds), "v": patterned(dtype, (3,), kinds), "0": patterned(dtype, (), 2)}
    file = compress_model(state)
    assert same(decompress_model(file), state)
    assert len(file) < sum(tensor.nbytes for tensor in state.values()) + 350


@pytest.mark.parametrize("gap_bits", [1, 5, 8, 12])
def test_bits_of_a_distance_are_a_setting(gap_bits):
    state = small().state_dict()
    file = compress_model(state, gap_bits)
    kinds = {each.name: each for each in directory.read(memoryview(file), 1 << 30)[0]}
    assert kinds["0.weight"].gap_bits == gap_bits
    assert same(decompress_model(file), state)
    assert len(file) >= len(compress_model(state))


def test_forms():
    """What a tensor becomes: zeros are left out where they are frequent, values are repeated where they are few."""
    assert entry(compress_model({"w": torch.randn(1000)})).kind == directory.RAW
    assert entry(compress_model({"w": torch.randint(1, 9, (1000,)).float()})).kind == directory.DENSE
    sparse = entry(compress_model({"w": torch.randint(1, 9, (1000,)).float() * (torch.rand(1000) < 0.1)}))
    assert (sparse.kind, sparse.values) == (directory.SPARSE, 8)  # zero is no value of the codebook
    constant = entry(compress_model({"w": torch.ones(1000)}))
    assert (constant.kind, constant.values, constant.code_bytes) == (directory.DENSE, 1, 0)
    nothing = entry(compress_model({"w": torch.zeros(100_000)}))
    assert nothing.nbytes <= 8


def test_a_weight_of_the_first_value_is_no_filler():
    """Fillers lie among the distances: the first place of the codebook is a weight like any other."""
    w = torch.zeros(10_000)
    w[[9, 5000, 9999]] = torch.tensor([2.0, 1.0, 1.0])
    file = compress_model({"w": w}, gap_bits=3)
    assert entry(file).symbols > 3
    assert torch.equal(decompress_model(file)["w"], w)


def test_tied_weights_are_in_the_file_once():
    torch.manual_seed(0)
    model = Tied()
    file = compress_model(model)
    assert len(file) < 1.3 * model.embedding.weight.nbytes
    state = decompress_model(file)
    assert same(state, model.state_dict())
    assert state["head.weight"] is state["embedding.weight"]
    other = Tied()
    decompress_model(file, into=other)
    assert same(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embedding.weight
    apart = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart["head.weight"] += 1
    with pytest.raises(ValueError, match=r"embedding\.weight, head\.weight share memory in the model"):
        decompress_model(compress_model(apart), into=other)
    assert same(other.state_dict(), model.state_dict())


def untied(seed=0):
    """An encoder and its decoder, apart."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))


def transposed(seed=0):
    """An encoder and a decoder that is the same memory."""
    model = untied(seed)
    model[1].weight = nn.Parameter(model[0].weight.t())
    return model


def test_tensors_that_overlap():
    """In another form than the first one's: what cannot be held is refused before anything is changed."""
    model, other = transposed(), transposed(1)
    decompress_model(compress_model(model), into=other)
    assert same(other.state_dict(), model.state_dict())
    state = {"a": torch.zeros(2), **other.state_dict()}
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight share memory in the model"):
        decompress_model(compress_model({"a": torch.ones(2), **untied().state_dict()}), into=state)
    assert same(state, before)
    both = torch.zeros(4, 6)
    halves = {"left": both[:, :3], "right": both[:, 3:]}  # between each other's ends, and no element in common
    decompress_model(compress_model({"left": torch.ones(4, 3), "right": torch.full((4, 3), 2.0)}), into=halves)
    assert both.sum(1).tolist() == [9] * 4


@pytest.mark.parametrize("view", [lambda: torch.zeros(1).expand(4), lambda: torch.zeros(4, dtype=torch.cfloat).conj()])
def test_what_holds_no_values_of_its_own_cannot_be_set(view):
    into = {"a": torch.zeros(2), "b": view()}
    file = compress_model({"a": torch.ones(2), "b": torch.ones(4, dtype=into["b"].dtype)})
    with pytest.raises(ValueError, match="b is an expanded, conjugated or negated view"):
        decompress_model(file, into=into)
    assert into["a"].tolist() == [0, 0]


class Counting(nn.Module):
    """Part of its state is no tensor of its own."""

    def __init__(self, count):
        super().__init__()
        self.count, self.inner = count, nn.Linear(2, 2)

    def get_extra_state(self):
        return torch.tensor([[float(self.count)]])

    def set_extra_state(self, state):
        self.count = int(state)


def test_a_module_is_given_what_it_makes_of_its_state():
    one, two = nn.Sequential(Counting(5)), nn.Sequential(Counting(9))
    decompress_model(compress_model(one), into=two)
    assert two[0].count == 5
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch itself
def test_wrapped_models_have_their_own_names():
    model = nn.Sequential(nn.Linear(3, 4))
    wrapped = torch.compile(nn.DataParallel(torch.compile(inside := copy.deepcopy(model))))
    assert Masks.magnitude(torch.compile(model), 0.5) == Masks.magnitude(model, 0.5)
    assert same(decompress_model(compress_model(wrapped)), model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    decompress_model(compress_model(model), into=wrapped)
    assert not inside[0].weight.any()


def test_a_model_is_loaded_in_place():
    model, other = small(), small(seed=1)
    pointers = [parameter.data_ptr() for parameter in other.parameters()]
    decompress_model(compress_model(model), into=other)
    assert same(other.state_dict(), model.state_dict())
    assert [parameter.data_ptr() for parameter in other.parameters()] == pointers
    x = torch.randn(8, 40)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_layers_count_with_everything():
    """The bytes of a file: 32 of the head, 16 of the checksum, 32 and 8 an axis and the name for a tensor, the part."""
    state = {"weight": torch.randn(4, 5), "b": torch.tensor(1)}
    assert len(compress_model(state)) == 32 + 16 + (32 + 16 + 6 + 80) + (32 + 1 + 8)


OTHERS = {
    "a name less": (lambda state: state.pop("3.bias"), "has more: 3.bias"),
    "a name more": (lambda state: state.update(x=torch.ones(1)), "lacks x"),
    "a shape": (lambda state: state.update({"0.weight": torch.ones(40, 50)}), r"0\.weight is float32 \(50, 40\) there"),
    "a dtype": (lambda state: state.update({"3.bias": torch.ones(10).double()}), r"and float64 \(10,\) in the model"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_model(kind):
    change, message = OTHERS[kind]
    target = {name: tensor.clone() for name, tensor in small(seed=1).state_dict().items()}
    change(target)
    before = copy.deepcopy(target)
    with pytest.raises(ValueError, match=message):
        decompress_model(compress_model(small()), into=target)
    assert same(target, before)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([1, 2], "expected a torch.nn.Module or its state dict, got list"),
        ({"a": 3.0}, "'a' must be a name with a plain tensor, got float"),
        ({1: torch.ones(2)}, "1 must be a name"),
        ({"a": torch.eye(3).to_sparse()}, "a must be a dense tensor"),
        ({"a": torch.ones(3, device="meta")}, "a must be a dense tensor with values"),
    ],
)
def test_states_that_are_refused(what, message):
    with pytest.raises(TypeError, match=message):
        compress_model(what)


@pytest.mark.parametrize("gap_bits", [0, 13, 2.5, "5", True])
def test_numbers_that_are_refused(gap_bits):
    with pytest.raises(ValueError, match=r"gap_bits, unless it is None, must be an integer in 1\.\.12"):
        compress_model({}, gap_bits)
    with pytest.raises(ValueError, match="max_bytes must be an integer of at least 0"):
        decompress_model(compress_model({}), max_bytes=float("nan"))


def test_every_truncation_is_refused():
    file = compress_model(small())
    target = small(seed=1)
    before = copy.deepcopy(target.state_dict())
    for length in range(len(file)):
        with pytest.raises(WireFormatError):
            decompress_model(file[:length], into=target)
    with pytest.raises(WireFormatError, match="claims"):
        decompress_model(file + b"\0")
    assert same(target.state_dict(), before)


def test_every_changed_byte_is_refused():
    file = bytearray(compress_model(small()))
    for at in range(len(file)):
        file[at] ^= 0x10
        with pytest.raises(WireFormatError):
            decompress_model(file)
        file[at] ^= 0x10


def test_other_bytes():
    with pytest.raises(WireFormatError, match="the model file has 0 bytes"):
        decompress_model(b"")
    with pytest.raises(WireFormatError, match="do not begin with its magic"):
        decompress_model(bytes(100))
    file = bytearray(compress_model({}))
    file[8] = 2
    with pytest.raises(WireFormatError, match="version 2, expected 1"):
        decompress_model(file)


def sealed(data):
    """A file with the right length and checksum."""
    body = bytearray(data[:-CHECKSUM])
    body[16:24] = (len(data)).to_bytes(8, "little")
    return bytes(body) + checksum(bytes(body))


def test_changed_files_with_a_right_checksum():
    """What a hostile writer can make: each is an error of this library or a state, in little memory."""
    draw = np.random.default_rng(0)
    state = {**small().state_dict(), "ties": torch.ones(7), "on": torch.tensor([True, False] * 80)}
    state["ties again"] = state["ties"]
    honest = compress_model(state)
    behind = 32 + int.from_bytes(honest[24:32], "little")
    words = (0, 1, 255, 4097, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1)
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    for number in range(1500):
        data = bytearray(honest)
        for _ in range(int(draw.integers(1, 4))):
            end = behind if number % 3 else len(data) - CHECKSUM
            at = int(draw.integers(8, end - 8))
            if number % 2:
                data[at] = int(draw.integers(256))
            else:
                data[at : at + 8] = words[draw.integers(len(words))].to_bytes(8, "little")
        if number % 7 == 0:
            at = int(draw.integers(32, len(data)))
            del data[at : at + int(draw.integers(40))]
        if len(data) < 64:
            continue
        try:
            decompress_model(sealed(data), max_bytes=1 << 20)
            outcomes[True] += 1
        except WireFormatError:
            outcomes[False] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(outcomes.values()) > 50, outcomes
    assert peak < 64 << 20


def test_a_size_is_refused_before_memory_is_allocated():
    bomb = compress_model({"w": torch.zeros(1 << 20)})
    assert len(bomb) < 200
    huge = bytearray(bomb)
    huge[64:72] = (1 << 50).to_bytes(8, "little")  # the only axis
    for data, limit in ((bomb, 1 << 20), (sealed(huge), None)):
        tracemalloc.start()
        with pytest.raises(WireFormatError, match=r"decodes to \d+ bytes, expected at most"):
            decompress_model(data, max_bytes=limit)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    with pytest.raises(ValueError, match="another model"):
        decompress_model(bomb, into={"w": torch.zeros(5)})


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_decoding_takes_memory_for_the_tensors_and_a_little(density):
    """Not for the codes of all elements, which are larger than elements of a byte."""
    torch.manual_seed(0)
    size = 1 << 23
    file = compress_model({"w": torch.randint(1, 3, (size,), dtype=torch.uint8) * (torch.rand(size) < density)})
    assert entry(file).kind == (directory.DENSE if density == 1 else directory.SPARSE)
    tracemalloc.start()
    decompress_model(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size + (50 << 20)


@pytest.mark.parametrize("axes", [(1 << 40, 1 << 40, 0), (1 << 63, 0, 1), (0, 1 << 61, 2)])
def test_an_empty_tensor_of_a_shape_that_torch_has_not(axes):
    file = bytearray(compress_model({"w": torch.empty(0, 1, 1)}))
    for axis, length in enumerate(axes):
        file[64 + 8 * axis : 72 + 8 * axis] = length.to_bytes(8, "little")
    with pytest.raises(WireFormatError, match="numbers of w in the directory contradict each other"):
        decompress_model(sealed(file))


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.08, 1.0])
def test_ten_million_weights_take_seconds(density):
    torch.manual_seed(0)
    size = 10_000_000
    values = torch.randn(32).sort().values
    weights = values[torch.randn(size).mul_(5).add_(16).clamp_(0, 31).long()] * (torch.rand(size) < density)
    compress_model({"w": torch.zeros(10)})
    start = time.process_time()
    file = compress_model({"w": weights})
    assert time.process_time() - start < 5
    start = time.process_time()
    state = decompress_model(file)
    assert time.process_time() - start < 5
    assert torch.equal(state["w"], weights)
