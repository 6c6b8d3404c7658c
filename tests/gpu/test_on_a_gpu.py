"""On a real GPU; skipped where there is none. What the kernels compute is tested on the CPU too (test_codecs.py)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_members import ON_GPU
from codecs_on_both import check_same_bytes
from compare import normal

from mpicomp import environment
from mpicomp.arrays import bound, to_device, to_host
from mpicomp.codecs import Key, TopK
from mpicomp.wire import MessageLayout

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    """Why nothing here can run."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    state = dict(environment.describe_gpu())["GPU"]
    return f"no GPU: {state}" if state.startswith("none") else None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 4099, 300_001])
@pytest.mark.parametrize("codec", ON_GPU, ids=str)
def test_payloads_are_the_cpus(codec, size, dtype):
    check_same_bytes(codec, normal(size, dtype, seed=size))


def test_what_the_compute_stream_does_next_spoils_nothing():
    """Compress on a stream, after an event, while the computation overwrites the source as soon as it may."""
    import cupy

    codec, size = TopK(0.01), 1 << 22
    layout = MessageLayout([codec.fields(size, "float32")])
    compute, side = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    rows = [normal(size, seed=seed) for seed in range(3)]
    messages = []
    with compute:
        source = cupy.empty(size, "f4")
        rows_there = [to_device(row) for row in rows]
    for row in rows_there * 5:
        with compute:
            source[...] = row
            ready = compute.record()
        with side:
            side.wait_event(ready)
            message = cupy.zeros(layout.nbytes, "u1")
            codec.encode(source, layout.views(message)[0], Key())
            messages.append(message)
            done = side.record()
        compute.wait_event(done)
    side.synchronize()
    for place, message in enumerate(messages):
        expected = np.zeros(layout.nbytes, np.uint8)
        codec.encode(rows[place % 3], layout.views(expected)[0], Key())
        assert to_host(message).tobytes() == expected.tobytes()


def test_a_bound_call_runs_on_the_stream_it_was_made_on():
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call = bound(lambda: cupy.cuda.get_current_stream().ptr, cupy.zeros(1))
    assert call() == stream.ptr


TRAIN = """
import sys, numpy as np, torch, torch.distributed as dist, mpicomp.torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("mpicomp")
me, ranks = dist.get_rank(), dist.get_world_size()
spec, amp = sys.argv[1], sys.argv[2] == "amp"
device = torch.device("cuda", 0)  # shared
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)).to(device)
ddp = DistributedDataParallel(module, bucket_cap_mb=0.3)
optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
scaler = torch.amp.GradScaler("cuda", init_scale=2.0**15, enabled=amp)
hook = mpicomp.torch.compress(ddp, spec, scaler=scaler)
generator = torch.Generator().manual_seed(me)
x, y = (torch.randn(64, 256, generator=generator).to(device) for _ in range(2))
losses = []
for step in range(60):
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.float16, enabled=amp):
        loss = (ddp(x) - 0.1 * y).square().mean()
    if amp and step == 7 and me == 1:
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(float(loss))
flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
found = [torch.empty_like(flat) for _ in range(ranks)]
dist.all_gather(found, flat)
assert all(torch.equal(each, found[0]) for each in found), "the replicas differ"
assert torch.isfinite(flat).all()
assert hook.step == 60 - amp, hook.step
assert losses[-1] < 0.5 * losses[0], losses
dist.destroy_process_group()
print("trained", flush=True)
"""


@pytest.mark.parametrize("amp", ["", "amp"])
@pytest.mark.parametrize(
    "spec", ["topk(density=0.1)", "error_feedback(two_stage(uniform(bits=4)))", "error_feedback(low_rank(rank=4))"]
)
def test_training_two_ranks_that_share_a_gpu(tmp_path, spec, amp):
    if importlib.util.find_spec("torch") is None or shutil.which("mpirun") is None:
        pytest.skip("needs torch and mpirun")
    program = tmp_path / "train.py"
    program.write_text(TRAIN)
    environ: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["mpirun", "-n", "2", sys.executable, "-m", "mpi4py", str(program), spec, amp],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained") == 2
