"""What a hook does to each parameter: by name, in its logical order, or exactly; and what telemetry says of it."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, size, units_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError, SpecError
from mpicomp.reducers import ByName

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

LOW_RANK = "error_feedback(low_rank(rank=2))"
SHAPES = {
    "embed_weight": (40, 16),
    "line_weight": (24, 32),
    "line_bias": (24,),
    "conv": (16, 5, 3, 3),
    "cube": (4, 3, 60),
}


def strided(name: str, x: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order of memory."""
    if x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    return x.mT.contiguous().mT if x.ndim > 1 else x


class Given(nn.Module):
    """Parameters whose gradients are given, whatever their strides: of tensors that are not used there are none."""

    def __init__(self, turned: bool = False, **more: torch.Tensor) -> None:
        super().__init__()
        self.all = nn.ParameterDict()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            x = torch.randn(shape)
            self.all[name] = nn.Parameter(strided(name, x) if turned else x)
        self.all.update({name: nn.Parameter(x) for name, x in more.items()})

    def forward(self, step: int) -> torch.Tensor:
        return sum((self.all[name] * g).real.sum() for name, g in gradients(self, step, me()).items())


def gradients(model: Given, step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in model.all.items()}


def exact(model: Given, step: int) -> dict[str, torch.Tensor]:
    """The mean over ranks; of a complex tensor that of the conjugates, which autograd forms."""
    every = [gradients(model, step, rank) for rank in range(size())]
    return {name: sum(each[name] for each in every).conj() / size() for name in every[0]}


def run(model: Given, method: Any, steps: int = 3, options: dict[str, Any] | None = None, **hook: Any) -> Any:
    """Return the gradients of each step by name, and the hook."""
    ddp = DDP(model, **(options or {}))
    made = mpicomp.torch.compress(ddp, method, **hook)
    found = []
    for step in range(steps):
        ddp.zero_grad()
        ddp(step).backward()
        found.append({name: p.grad.clone() for name, p in model.all.items()})
    return found, made


@pytest.mark.parametrize("method", ["topk(density=0.05)", "error_feedback(two_stage(uniform(bits=4)))", LOW_RANK])
@pytest.mark.parametrize("view", [False, True])
def test_strides_change_nothing(method: str, view: bool) -> None:
    options = {"bucket_cap_mb": 0.004, "gradient_as_bucket_view": view}
    (plain, kept), (turned, kept_too) = (run(Given(t), method, options=options) for t in (False, True))
    for a, b in zip(plain, turned, strict=True):
        for name in a:
            if method == LOW_RANK:  # MPI's own sum
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(a[name], b[name]), name
    owed, owed_too = (units_of(each.state_dict())["all.conv"]["residual"] for each in (kept, kept_too))
    np.testing.assert_allclose(np.asarray(owed).reshape(-1), np.asarray(owed_too).reshape(-1), rtol=1e-4, atol=1e-4)
    assert owed.abs().sum() > 0


def test_a_mask_is_that_of_the_tensor_the_user_sees() -> None:
    model = Given(turned=True)
    ddp = DDP(model)
    hook = mpicomp.torch.compress(ddp, "masked(dense(algorithm=two_shot))")
    masks = {f"all.{name}": p > 0 for name, p in model.all.items()}
    hook.set_masks(masks)
    ddp(0).backward()
    for name, mean in exact(model, 0).items():
        torch.testing.assert_close(model.all[name].grad, mean * (model.all[name] > 0), rtol=1e-5, atol=1e-6)


def test_each_parameter_goes_by_the_first_rule_that_its_name_matches() -> None:
    rules = {
        "*embed*": "randomk(density=0.1)",
        "*bias": "dense",
        "all.c*": "uniform(bits=4)",
        "*": "topk(density=0.05)",
    }
    taken = {"embed_weight": "*embed*", "line_bias": "*bias", "conv": "all.c*", "cube": "all.c*", "line_weight": "*"}
    found, hook = run(Given(), rules)
    assert isinstance(hook.reducer, ByName)
    again, spelled = run(Given(), hook.resolved)
    assert spelled.resolved == hook.resolved
    for name, pattern in taken.items():
        alone, _ = run(Given(), rules[pattern])
        for step in range(3):
            assert torch.equal(found[step][name], again[step][name])
            if pattern == "*bias":
                torch.testing.assert_close(found[step][name], alone[step][name])
            else:
                assert torch.equal(found[step][name], alone[step][name]), name
    with pytest.raises(ValueError, match=r"no rule for all\.embed_weight, only for 'all\.c\*'; add one"):
        mpicomp.torch.compress(DDP(Given()), {"all.c*": "sign"})
    with pytest.raises(SpecError, match="did you mean 'topk'"):
        mpicomp.torch.compress(DDP(Given()), {"*": "tpk"})


# ------------------------------------------------------------------------------------------------ exactly


def mixed() -> Given:
    return Given(phase=torch.ones(9, dtype=torch.complex64), wave=torch.ones(4, 6, dtype=torch.complex128).t())


def test_complex_gradients_travel_exactly_and_the_warning_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, hook = run(mixed(), "topk(density=0.05)", options={"bucket_cap_mb": 0.004})
    said = [str(each.message) for each in caught if "travel exactly" in str(each.message)]
    assert said == ["these gradients travel exactly, beside the compressed ones: all.phase (complex64); "
                    "all.wave (complex128)"] * (me() == 0)  # fmt: skip
    plain, _ = run(Given(), "topk(density=0.05)", options={"bucket_cap_mb": 0.004})
    for step in range(3):
        means = exact(mixed(), step)
        for name in ("phase", "wave"):
            torch.testing.assert_close(found[step][name], means[name], rtol=1e-5, atol=1e-6)
        if size() > 1:
            assert not torch.allclose(found[step]["conv"], means["conv"])
    assert hook.step == 3
    assert "all.phase" not in {name for name, kept in units_of(hook.state_dict()).items() if "residual" in kept}
    assert plain[0].keys() < found[0].keys()


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line = nn.Embedding(50, 8, sparse=sparse), nn.Linear(8, 64)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.line(self.table(words)).square().sum()


@pytest.mark.parametrize("cap", [0.0001, 25])
def test_sparse_gradients_travel_exactly(cap: float) -> None:
    """As those of a dense table do, over many buckets and one; the rest has the same bits."""
    steps = []
    for sparse in (True, False):
        ddp = DDP(Words(sparse), bucket_cap_mb=cap)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*travel exactly.*table.weight .sparse gradient.")
            hook = mpicomp.torch.compress(ddp, {"table*": "dense(algorithm=two_shot)", "*": "topk(density=0.1)"})
        for step in range(3):
            ddp.zero_grad()
            ddp(torch.tensor([me(), 7, 7, step])).backward()
        assert hook.step == 3
        steps.append(ddp.module)
    grad = steps[0].table.weight.grad
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), steps[1].table.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(steps[0].line.weight.grad, steps[1].line.weight.grad, rtol=1e-5, atol=1e-6)


def compressed(model: nn.Module, method: Any, **options: Any) -> tuple[DDP, mpicomp.torch.Hook]:
    ddp = DDP(model, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*travel exactly.*")
        return ddp, mpicomp.torch.compress(ddp, method)


def test_sparse_gradients_in_a_description_in_telemetry_and_in_a_state() -> None:
    ddp, hook = compressed(Words(sparse=True), "topk(density=0.1)")
    fates = {each.name: each for each in hook.describe()}
    assert fates["table.weight"].method == "exactly: sparse gradient"
    assert fates["table.weight"].nbytes is None
    assert "table.weight  float32 [50, 8]  varies  exactly" in str(hook.describe())
    found = mpicomp.torch.telemetry(hook, every=1, compare=True)
    for step in range(2):
        ddp.zero_grad()
        ddp(torch.tensor([me(), 7, step])).backward()
    found.close()
    if me() == 0:
        rows = {row.parameter: row for row in found.rows}
        assert rows["table.weight"].elements == 400
        assert rows["table.weight"].vnmse is None
        assert (rows["table.weight"].bytes > 0) == (size() > 1)
        assert rows[""].bytes == pytest.approx(sum(row.bytes for name, row in rows.items() if name))
        assert rows["line.weight"].vnmse is not None
    state = hook.state_dict()
    assert "residual" not in units_of(state).get("table.weight", {})
    again, other = compressed(Words(sparse=True), "topk(density=0.1)")
    assert other.load_state_dict(state) == []
    for each in (ddp, again):
        each.zero_grad()
        each(torch.tensor([me(), 7, 2])).backward()
    for a, b in zip(ddp.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad.to_dense(), b.grad.to_dense())


def test_sparse_gradients_that_accumulate_or_are_not_there() -> None:
    """As those of a dense table, where a rank adds up two backwards, and where a layer is not used."""
    grads = []
    for sparse in (True, False):
        model = Words(sparse)
        model.idle = nn.Linear(9, 70)
        ddp, hook = compressed(model, {"table*": "dense", "*": "topk(density=0.1)"}, find_unused_parameters=True)
        with ddp.no_sync():
            ddp(torch.tensor([me(), 3])).backward()
        ddp(torch.tensor([me(), 4])).backward()
        assert hook.step == 1
        grads.append([p.grad.to_dense() for p in (model.table.weight, model.line.weight)])
        assert model.idle.weight.grad is None
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sparse_gradients_of_other_dtypes(dtype: torch.dtype) -> None:
    ddp, hook = compressed(Words(sparse=True).to(dtype), "topk(density=0.1)")
    for _ in range(2):
        ddp.zero_grad()
        ddp(torch.tensor([me(), 2])).backward()
    grad = ddp.module.table.weight.grad
    assert grad.dtype == dtype
    assert set(grad.coalesce().indices().view(-1).tolist()) == {*range(size()), 2}
    assert hook.step == 2


def test_a_table_that_is_no_longer_sparse_is_an_error_on_all_ranks() -> None:
    model = Words(sparse=True)
    ddp = DDP(model)
    model.table.sparse = False
    mpicomp.torch.compress(ddp, "topk(density=0.1)")
    model.table.sparse = True
    with pytest.raises(ValueError, match=r"table.weight has a sparse gradient, unlike its module when"):
        ddp(torch.tensor([1, 2])).backward()


@pytest.mark.parametrize("what", ["complex", "sparse"])
def test_a_step_whose_exact_gradients_are_not_finite_is_skipped_with_a_scaler(what: str) -> None:
    model = mixed() if what == "complex" else Words(sparse=True)
    ddp = DDP(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*travel exactly.*")
        hook = mpicomp.torch.compress(ddp, "topk(density=0.05)", scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    spoiled = model.all["phase"] if what == "complex" else model.table.weight
    for step in range(3):
        optimizer.zero_grad()
        handle = None
        if step == 1 and me() == size() - 1:
            handle = spoiled.register_hook(lambda grad: grad * float("inf"))
        scaler.scale(ddp(torch.tensor([1, 2]) if what == "sparse" else step)).backward()
        if handle is not None:
            handle.remove()
        if what == "complex":  # torch's scaler knows no complex gradients
            scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {}
        else:
            scaler.step(optimizer)
            scaler.update()
    assert hook.step == 2


# ------------------------------------------------------------------------------------------------- refused


def in_backward(ddp: DDP) -> None:
    with warnings.catch_warnings():  # of torch, about its own code
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(torch.optim.SGD, ddp.module.parameters(), {"lr": 0.1})


def half(ddp: DDP) -> None:  # torch builds one on a GPU only
    ddp.mixed_precision = torch.nn.parallel.distributed._MixedPrecision(param_dtype=torch.float16)


def traced(ddp: DDP) -> None:
    ddp._use_python_reducer = True


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(in_backward, "optimizer of .* runs in backward"), (half, "mixed_precision"), (traced, "python_reducer")],
)
def test_what_no_hook_works_with_is_refused_on_all_ranks(spoil: Any, words: str) -> None:
    ddp = DDP(nn.Linear(20, 30))
    if me() == size() - 1:
        spoil(ddp)
    with pytest.raises(RuntimeError if me() == size() - 1 else ConfigMismatchError, match=words):
        mpicomp.torch.compress(ddp, "sign")
    dist.barrier()


def test_dgc_refuses_what_has_no_momentum() -> None:
    with pytest.raises(ValueError, match=r"all\.phase travels exactly \(complex64\), so no momentum"):
        mpicomp.torch.DGCSGD(DDP(mixed()), 0.1, "topk(density=0.1)")


# ------------------------------------------------------------------------------------------------ telemetry


def test_describe_says_what_happens_to_each_parameter() -> None:
    warmed = "warmup(error_feedback(gather(topk(density=0.05))), densities=(0.25,), steps=9)"
    rules = {"*embed*": "after(error_feedback(two_stage(bf16)), steps=2)", "*bias": "dense", "*": warmed}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*travel exactly.*")
        hook = mpicomp.torch.compress(DDP(mixed()), rules, min_size=200)
    fates = {each.name.removeprefix("all."): each for each in hook.describe()}
    assert list(fates) == list(mixed().all)
    assert fates["phase"].method == "exactly: complex64"
    assert fates["phase"].dtype == "complex64"
    assert fates["embed_weight"].method == "after(error_feedback(two_stage(cast(dtype=bf16))), steps=2)"
    assert fates["line_bias"].method == "dense"
    assert fates["conv"].method == warmed
    text = str(hook.describe())
    assert all(name in text for name in fates)
    assert hook.resolved in text
    if size() == 2:
        assert fates["phase"].nbytes == fates["phase"].dense == 9 * 8
        assert 0 < fates["conv"].nbytes < fates["conv"].dense == 720 * 4


def test_telemetry_is_what_the_counters_and_the_state_say(tmp_path: Path) -> None:
    model = mixed()
    ddp = DDP(model, bucket_cap_mb=0.004)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*travel exactly.*")
        hook = mpicomp.torch.compress(ddp, "topk(density=0.05)")
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, *what: Any) -> None:
            scalars.append(what)

    path = tmp_path / "steps.csv"
    found = mpicomp.torch.telemetry(hook, csv=path, tensorboard=Writer(), every=2, compare=True)
    for step in range(3):
        ddp.zero_grad()
        ddp(step).backward()
    found.close()
    before = hook.traffic.bytes
    hook.step  # noqa: B018 (counts the last step)
    ddp.zero_grad()
    ddp(2).backward()  # without telemetry: step 3, of the same sizes
    sent = hook.traffic.bytes - before
    if me() != 0:
        assert found.rows == scalars == []
        assert not path.exists()
        return
    total, *rows = found.rows
    assert (total.step, total.parameter) == (2, "")
    assert {row.parameter for row in rows} == {f"all.{name}" for name in model.all}
    assert total.bytes == pytest.approx(sum(row.bytes for row in rows))
    agreements = sent - total.bytes  # of every bucket
    assert 0 <= agreements <= 16 * 2 * len(hook._buckets)
    assert all(seconds >= 0 for seconds in total[-3:])
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["0"] * 8 + ["2"] * 8
    assert float(lines[8]["bytes"]) == total.bytes
    assert ("mpicomp/bytes", total.bytes, 2) in scalars
    assert ("mpicomp_vnmse/all.conv", next(r for r in rows if r.parameter == "all.conv").vnmse, 2) in scalars


def test_telemetry_compares_with_the_exact_mean() -> None:
    model = Given(turned=True)
    ddp = DDP(model)
    hook = mpicomp.torch.compress(ddp, {"*bias": "dense", "*": "uniform(bits=2)"})
    found = mpicomp.torch.telemetry(hook, every=1, compare=True, rank=size() - 1)
    for step in range(2):
        ddp.zero_grad()
        ddp(step).backward()
    hook.step  # noqa: B018
    kept = units_of(hook.state_dict())
    found.close()
    means = exact(model, 1)
    for row in found.rows[1:]:
        name = row.parameter.removeprefix("all.")
        a, b = model.all[name].grad.double().reshape(-1), means[name].double().reshape(-1)
        assert row.vnmse == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-3, abs=1e-9)
        assert row.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-5)
        residual = kept[row.parameter].get("residual")
        norm = None if residual is None else float(np.linalg.norm(np.asarray(residual)))
        assert row.residual_norm == (None if norm is None else pytest.approx(norm, rel=1e-5))
    assert bool(found.rows) == (me() == size() - 1)


def test_telemetry_refuses_bad_settings_on_all_ranks(tmp_path: Path) -> None:
    hook = mpicomp.torch.compress(DDP(nn.Linear(20, 30)), "sign")
    last = me() == size() - 1
    if size() > 1:
        with pytest.raises(ConfigMismatchError, match="every"):
            mpicomp.torch.telemetry(hook, every=3 if last else 2)
    for settings, kind, words in [
        ({"every": 0}, ValueError, "every must be"),
        ({"rank": size()}, ValueError, "rank must be one of"),
        ({"compare": 1}, ValueError, "compare must be True"),
        ({"tensorboard": 3, "rank": size() - 1}, TypeError, "add_scalar"),
        ({"csv": tmp_path / "none" / "x.csv", "rank": size() - 1}, OSError, "x.csv"),
    ]:
        alone = "rank" in settings and settings["rank"] < size() and not last
        with pytest.raises(ConfigMismatchError if alone else kind, match=words):
            mpicomp.torch.telemetry(hook, **settings)
    mpicomp.torch.telemetry(hook)
    with pytest.raises(RuntimeError, match="has telemetry already"):
        mpicomp.torch.telemetry(hook)
