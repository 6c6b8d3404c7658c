"""Weight sharing: Lloyd's iteration against the optimum and scikit-learn, and centroids that learn."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from mpicomp.models import Codebooks, Masks, compress_model, sharing


def normal(n=2000, seed=0):
    return np.sort(np.random.default_rng(seed).standard_normal(n).astype(np.float32))


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))


def lloyd_by_hand(values, centroids):
    """The iteration with all distances."""
    for _ in range(1000):
        nearest = np.abs(values[:, None] - centroids).argmin(1)
        new = np.array([values[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centroids)])
        if np.allclose(new, centroids, rtol=0, atol=1e-12):
            break
        centroids = new
    return new


@pytest.mark.parametrize("k", [1, 2, 4, 16])
def test_prefix_sums_give_lloyds_iteration(k):
    values = normal()
    found = sharing.lloyd(values, sharing.linear(values, k))
    expected = lloyd_by_hand(values.astype(np.float64), sharing.linear(values, k))
    expected = expected[np.unique(np.abs(values[:, None] - expected).argmin(1))]  # those that have weights
    assert np.allclose(found, expected, atol=1e-4)


def test_equal_to_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    values = np.sort(
        np.random.default_rng(0).random(2000).astype(np.float32)
    )  # it would move a centroid without values
    start = sharing.linear(values, 16)
    other = cluster.KMeans(16, init=start[:, None], n_init=1, tol=0, max_iter=1000).fit(values[:, None].astype(float))
    assert sharing.squares(values, sharing.lloyd(values, start)) == pytest.approx(other.inertia_, rel=1e-3)


def brute(values, k):
    """The least sum of squares, by all cuts."""
    n = values.size
    exact = values.astype(np.float64)
    cost = np.full((k + 1, n + 1), np.inf)
    cost[0, 0] = 0
    for clusters in range(1, k + 1):
        for end in range(1, n + 1):
            for begin in range(end):
                part = exact[begin:end]
                tried = cost[clusters - 1, begin] + ((part - part.mean()) ** 2).sum()
                cost[clusters, end] = min(cost[clusters, end], tried)
    return cost[:, n].min()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 50])
def test_the_optimum_is_the_optimum(k):
    values = normal(40)
    found = sharing.optimum(values, k)
    assert found.size <= k
    assert (np.diff(found) > 0).all()
    assert sharing.squares(values, found) == pytest.approx(brute(values, min(k, 40)), rel=1e-6, abs=1e-9)


def test_lloyd_beside_the_optimum():
    """What the linear start costs: 24 % more squares than the optimum at 5 bits on a normal sample, little at 2."""
    values = normal(20_000)
    above = {}
    for k in (4, 16, 32):
        lloyd = sharing.squares(values, sharing.lloyd(values, sharing.linear(values, k)))
        above[k] = lloyd / sharing.squares(values, sharing.optimum(values, k))
    assert all(each >= 1 - 1e-9 for each in above.values())
    assert above[4] < 1.001
    assert above[16] < 1.1
    assert above[32] < 1.5


def test_linear_start_keeps_rare_large_weights_and_forgy_loses_them():
    """Forgy takes weights at random, and so hardly ever one of the few that are large."""
    values = np.sort(np.concatenate([normal(5000), np.float32([9, 10, 11])]))
    linear = sharing.lloyd(values, sharing.linear(values, 8))
    chosen = np.sort(np.random.default_rng(0).choice(normal(5000), 8, replace=False)).astype(np.float64)
    forgy = sharing.lloyd(values, chosen)
    assert linear[-1] >= 10
    assert forgy[-1] < 5


def test_centroids_without_weights_are_dropped():
    values = np.sort(np.float32([-1, -1, -0.9, 5, 5.1]))
    found = sharing.lloyd(values, sharing.linear(values, 32))
    assert found.size <= 5
    assert set(sharing.nearest(values, found)) == set(range(found.size))
    assert sharing.lloyd(np.zeros(0, np.float32), np.zeros(0)).size == 0
    assert sharing.lloyd(np.float32([3, 3, 3]), sharing.linear(np.float32([3, 3, 3]), 8)).tolist() == [3]
    assert sharing.optimum(np.float32([3, 3, 3]), 8).tolist() == [3]
    assert sharing.optimum(np.zeros(0, np.float32), 8).size == 0


@pytest.mark.parametrize("optimal", [False, True])
def test_codebooks_of_a_model(optimal):
    net = model()
    Masks.magnitude(net, 0.8).apply(net)
    before = copy.deepcopy(net.state_dict())
    codebooks = Codebooks.fit(net, 3, optimal=optimal)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert list(codebooks) == ["0.weight", "3.weight"]
    codebooks.apply(net)
    for name, shared in codebooks.items():
        weights = net.get_parameter(name)
        assert torch.equal(weights == 0, before[name] == 0)
        assert len(weights[weights != 0].unique()) <= 8
        assert shared.values[0] == 0
        assert torch.equal(shared.weights, weights)
    assert torch.equal(net[0].bias, before["0.bias"])


def test_the_step_of_the_paper():
    """dL/dC_k is the sum of dL/dW over the cluster, and C_k moves by the learning rate times that."""
    net = model()
    Masks.magnitude(net, 0.5).apply(net)
    codebooks = Codebooks.fit(net, {"0.weight": 2})
    codebooks.apply(net)
    values, codes = codebooks["0.weight"]
    old, optimizer = values.clone(), torch.optim.SGD(net.parameters(), 0.01)
    codebooks.attach(optimizer, net)
    net(torch.randn(8, 20)).square().sum().backward()
    gradient = net[0].weight.grad.clone()
    optimizer.step()
    for k in range(1, values.numel()):
        moved = old[k] - 0.01 * gradient[codes == k].double().sum()
        assert codebooks["0.weight"].values[k].item() == pytest.approx(moved.item(), abs=1e-6)
    assert torch.equal(codebooks["0.weight"].weights, net[0].weight)
    assert (net[0].weight[codes == 0] == 0).all()


@pytest.mark.parametrize("kind", ["sgd", "adam", "decay", "rmsprop"])
def test_any_optimizer_keeps_the_clusters(kind):
    net = model()
    Masks.magnitude(net, 0.6).apply(net)
    torch.manual_seed(1)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, 0.01),
        "decay": lambda p: torch.optim.SGD(p, 0.01, weight_decay=0.1, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    }[kind](net.parameters())
    net(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()  # momentum that single weights have from before
    Masks.magnitude(net, 0.6).apply(net)
    codebooks = Codebooks.fit(net, 2)
    codebooks.apply(net)
    codes = {name: shared.codes.clone() for name, shared in codebooks.items()}
    handle = codebooks.attach(optimizer, net)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    for name, shared in codebooks.items():
        weights = net.get_parameter(name)
        assert torch.equal(shared.codes, codes[name])
        assert torch.equal(shared.weights, weights)
        assert (weights[codes[name] == 0] == 0).all()
        assert len(weights[weights != 0].unique()) <= 4
    handle.remove()
    net(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    assert len(net[0].weight.unique()) > 5


def test_fine_tuning_lowers_the_loss():
    net = model()
    inputs, targets = torch.randn(64, 20), torch.randint(0, 5, (64,))
    codebooks = Codebooks.fit(net, 2)
    codebooks.apply(net)
    optimizer = torch.optim.SGD([net[0].weight, net[3].weight], 5e-3, momentum=0.9)
    codebooks.attach(optimizer, net)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


def test_the_ratio_of_the_paper():
    """Without indices n weights of b bits become n log2 K + K b bits: r = n b / (n log2 K + K b), the code's bound."""
    n, k, b = 64_000, 32, 32
    torch.manual_seed(0)
    values = torch.randn(k)
    even = values[torch.randperm(n) % k]  # every value equally often: nothing for an entropy coder to gain
    file, empty = compress_model({"w": even}), compress_model({"w": torch.empty(0)})
    ratio = n * b / (8 * (len(file) - len(empty)))
    assert ratio == pytest.approx(n * b / (n * math.log2(k) + k * b), rel=0.005)


def test_half_precision_and_double():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        net = nn.Linear(30, 30).to(dtype)
        codebooks = Codebooks.fit(net, 3)
        codebooks.apply(net)
        assert net.weight.dtype == dtype
        assert len(net.weight.unique()) <= 8


def test_what_is_refused():
    net = model()
    with pytest.raises(ValueError, match=r"bits must be an integer in 1\.\.12, got 0 for 0\.weight"):
        Codebooks.fit(net, 0)
    with pytest.raises(ValueError, match=r"got 2\.5"):
        Codebooks.fit(net, 2.5)
    with pytest.raises(ValueError, match="no parameter head"):
        Codebooks.fit(net, {"head": 4})
    codebooks = Codebooks.fit(net, 3)
    other = nn.Sequential(nn.Linear(20, 31))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"for shape \(30, 20\), and the parameter has \(31, 20\)"):
        codebooks.apply(other)
    with pytest.raises(ValueError, match=r"no parameter 0\.weight"):
        codebooks.attach(torch.optim.SGD(net.parameters(), 0.1), nn.Linear(2, 2))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0\.weight holds NaN or infinity"):
        Codebooks.fit(net, 3)
    with pytest.raises(TypeError, match="complex64; only floating-point"):
        Codebooks.fit(nn.ParameterDict({"z": nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))}), {"z": 2})


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_a_step_like_any_other(keyword):
    """Its gradients come after the step has begun; they are summed over clusters all the same."""
    x, ends = torch.randn(8, 20), []
    for closes in (False, True):
        net = model()
        codebooks = Codebooks.fit(net, 2)
        codebooks.apply(net)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        codebooks.attach(optimizer, net)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            if not closes:
                closure()
                optimizer.step()
            else:
                assert (optimizer.step(closure=closure) if keyword else optimizer.step(closure)) > 0
        ends.append(codebooks["0.weight"].values)
    assert torch.equal(*ends)


def test_weights_at_rest_stay_as_they_are():
    """The mean of 10^5 equal weights is another number in the last places."""
    net = nn.Linear(1000, 100, bias=False).double()
    with torch.no_grad():
        net.weight.fill_(0.1)
    codebooks = Codebooks({"weight": sharing.Shared(torch.tensor([0, 0.1]).double(), torch.ones(100, 1000).long())})
    codebooks.apply(net)
    before = net.weight.detach().clone()
    codebooks.update(net)
    assert torch.equal(net.weight, before)


def test_sums_that_no_float_holds_and_sparse_gradients_are_refused():
    net = nn.Linear(10, 10).double()
    with torch.no_grad():
        net.weight.fill_(1e308)
    with pytest.raises(ValueError, match="weights of weight are too large"):
        Codebooks.fit(net, 2)
    embedding = nn.Embedding(6, 4, sparse=True)
    codebooks = Codebooks.fit(embedding, 2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of weight is sparse"):
        codebooks.sum_gradients(embedding)
