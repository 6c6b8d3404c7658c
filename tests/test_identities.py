"""Every identity of the nine works and their companions that needs no training, and the test that it has.

What a training must show is in `bench/reproduce`. `IDENTITIES` names a test for each identity; those without one in the
tests of their part are here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from codec_members import decoded, encoded, normal
from named_tests import gone
from reducers.members import inputs, layout_of, member, run
from team import Team

from mpicomp.codecs import MXFP4, MXFP8, DoReFa, Key, Sign, TopK
from mpicomp.codecs.atomo import probabilities
from mpicomp.comm.communicator import Comm
from mpicomp.comm.topology import Topology
from mpicomp.federated import Network, conv, flatten, linear, lossy
from mpicomp.federated.links import Bundle
from mpicomp.reducers import Integer, Layout

HERE = "test_identities.py"

IDENTITIES: dict[str, dict[str, str]] = {
    "Deep Compression": {
        "without indices r = n b / (n log2 K + K b)": "models/test_sharing.py::test_the_ratio_of_the_paper",
        "LeNet-300-100 of 1070 KB at 8 %: 27 KB": f"{HERE}::test_lenet_300_100_at_eight_per_cent_has_the_papers_bytes",
        "3 bits cover distances 1..8, then a filler": "models/test_indices.py::test_the_figure_of_the_paper",
        "a filler is no place of the codebook": "models/test_files.py::test_a_weight_of_the_first_value_is_no_filler",
        "round trips are bit-exact": "models/test_files.py::test_round_trip",
        "dL/dC_k is the sum of dL/dW of its cluster": "models/test_sharing.py::test_the_step_of_the_paper",
        "a linear start keeps rare large weights, Forgy's does not": "models/test_sharing.py::"
        "test_linear_start_keeps_rare_large_weights_and_forgy_loses_them",
        "Lloyd's clusters beside the 1-D optimum": "models/test_sharing.py::test_lloyd_beside_the_optimum",
        "clusters may be empty": "models/test_sharing.py::test_centroids_without_weights_are_dropped",
        "one symbol has a code": "models/test_entropy.py::test_nothing_and_one_symbol_cost_nothing",
        "no longer than Huffman's code with its table": "models/test_entropy.py::"
        "test_never_longer_than_huffman_with_its_table",
        "headers, codebooks and biases count": "models/test_files.py::test_layers_count_with_everything",
        "momentum and decay revive no pruned weight": "models/test_pruning.py::"
        "test_pruned_weights_stay_at_rest_whatever_the_optimizer",
        "10^7 weights in 5 s": "models/test_files.py::test_ten_million_weights_take_seconds",
    },
    "Survey": {
        "linear: payloads add": "codecs/test_contract.py::test_payloads_of_linear_codecs_may_be_summed",
        "unbiased: the mean over keys is the input": "codecs/test_statistics.py::test_mean_over_keys_is_the_input",
        "contractive: less is lost than all": "codecs/test_statistics.py::test_contractive_codecs_lose_less_than_all",
        "what needs error feedback gets it, and no other": "reducers/test_policies.py::"
        "test_every_codec_has_its_contraction_under_feedback",
        "every codec is in the table": "bench/test_works_survey.py::test_the_table_has_a_row_for_every_codec",
    },
    "Deep Gradient Compression": {
        "v_new + sent == v_old + u": "reducers/test_momentum.py::test_what_is_sent_and_kept_is_what_was_kept_and_u",
        "density 1 without masking is momentum SGD": "reducers/test_momentum.py::"
        "test_with_density_1_and_without_masking_it_is_momentum_sgd",
        "density 1 with masking is plain SGD": "reducers/test_momentum.py::"
        "test_with_density_1_masking_makes_it_sgd_without_momentum",
        "sent + v is conserved; staleness": "reducers/test_momentum.py::"
        "test_all_that_was_sent_and_is_left_is_all_that_came",
        "masking changes u only": "reducers/test_momentum.py::"
        "test_masking_changes_u_only_and_only_where_something_was_sent",
        "32 / (0.001 * 48) = 667 at 48 bits a record": f"{HERE}::test_an_entry_takes_less_than_a_record_of_48_bits",
        "clipping by N^-1/2 before adding up": "mpi/test_dgc.py::"
        "test_a_ranks_gradient_is_clipped_before_it_is_added_up",
        "weight decay acts on the weight": "mpi/test_dgc.py::test_weight_decay_acts_on_the_weight",
        "exact top-k of what a sample lets through": "codecs/test_sparse.py::"
        "test_a_sample_that_misleads_costs_time_only",
    },
    "Binarized networks": {
        "XNOR-popcount is the integer product for any n": "kernels/test_binary.py::test_the_product_is_exact_for_any_n",
        "packed logits are those of the model": "models/test_fold.py::test_any_sizes",
        "a broadcast has ceil(n / 8) bytes and a header": f"{HERE}::test_a_packed_network_travels_at_a_bit_a_weight",
        "32 times less weight memory": "models/test_fold.py::test_weights_take_a_bit_each",
        "sign(0) = +1": "models/test_binary.py::test_zero_counts_as_plus_one",
        "gradients pass where |a| <= 1": "models/test_binary.py::test_the_gradient_of_an_activation_stops_beyond_one",
        "the gradient is taken at the signs": "models/test_binary.py::"
        "test_a_linear_layer_computes_with_signs_and_takes_the_gradient_at_them",
        "latent weights are clipped": "models/test_binary.py::test_latent_weights_stay_within_one",
        "BatchNorm and sign are a threshold": "models/test_fold.py::test_a_threshold_is_where_the_layers_change_sign",
        "AP2(x) = sign(x) 2^round(log2 |x|)": "models/test_shift.py::"
        "test_ap2_is_the_nearest_power_of_two_by_the_logarithm",
        "shift-based BatchNorm": "models/test_shift.py::test_normalisation_is_by_its_formula",
        "shift-based AdaMax": "models/test_shift.py::test_adamax_shifts_its_momentum",
        "the vote is the sign of a sum; P signs need log2(P + 1) bits": "kernels/test_binary.py::"
        "test_majorities_are_those_of_counts",
    },
    "DoReFa": {
        "mean of f within 4 standard errors, no error above a step": "models/test_dorefa.py::"
        "test_the_gradient_quantiser_is_unbiased_over_its_whole_range",
        "zero becomes either end": f"{HERE}::test_no_value_is_zero_and_a_zero_becomes_either_end_equally_often",
        "one scale per sample; zeros stay": "models/test_dorefa.py::"
        "test_every_sample_has_a_scale_of_its_own_and_zeros_stay_zeros",
        "1-bit weights": "models/test_dorefa.py::test_weights_of_one_bit_are_signs_times_the_mean_of_the_layer",
        "k-bit weights": "models/test_dorefa.py::test_weights_of_more_bits_are_quantised_tanh",
        "activations": "models/test_dorefa.py::test_activations_are_clipped_and_their_gradient_too",
        "noise differs between ranks": "models/test_dorefa.py::"
        "test_noise_repeats_and_differs_between_ranks_layers_passes_and_seeds",
    },
    "Gradual pruning": {
        "half way s is 0.875 s_f": "models/test_schedule.py::test_half_way_it_is_at_seven_eighths",
        "exactly so many weights survive": "models/test_schedule.py::"
        "test_a_model_has_exactly_the_weights_of_the_schedule_at_every_step",
        "5020 and 1255 of the MLP on digits": f"{HERE}::test_what_survives_of_the_mlp_on_digits",
        "ties and dead units prune no more": "models/test_pruning.py::test_ties_and_dead_units_prune_no_more",
        "at most 0.11x the bytes": "reducers/test_masked.py::test_only_what_survives_travels",
        "the same masks on all ranks": "mpi/test_masks.py::test_a_model_is_pruned_alike_on_all_ranks",
    },
    "Gradient dropping": {
        "sum(sent) + r == sum(g)": f"{HERE}::test_what_was_dropped_is_sent_or_left",
        "a sample keeps 0.5 to 2 times the density": "reducers/test_joined.py::"
        "test_the_threshold_of_a_sample_keeps_about_the_density",
        "what exceeds the room goes back to r": "reducers/test_joined.py::"
        "test_what_exceeds_the_capacity_goes_back_to_the_residual",
        "a small matrix has a sample": "reducers/test_joined.py::test_a_small_array_has_a_sample_of_all",
        "a global threshold starves small gradients": "reducers/test_joined.py::"
        "test_one_threshold_for_all_tensors_is_that_of_the_largest",
        "both directions are sparse": "reducers/test_joined.py::"
        "test_both_directions_are_sparse_with_the_residual_at_the_owner",
        "99 % of elements are 66x in bytes or more": f"{HERE}::test_an_entry_takes_less_than_a_record_of_48_bits",
    },
    "Federated Dropout": {
        "8 * 1.78 = 14.2 down, 16 * 1.78 = 28.4 up": f"{HERE}::test_the_papers_ratios_but_for_ranges_and_headers",
        "normalised errors at 2 bits": "federated/test_links.py::test_errors_of_kashin_and_hadamard",
        "without a rotation a heavy tail wastes all levels": "federated/test_links.py::"
        "test_without_a_rotation_one_large_number_wastes_all_levels",
        "4-bit Hadamard beats 2-bit Kashin": "federated/test_links.py::"
        "test_kashin_pays_at_two_bits_and_four_bits_of_hadamard_beat_it",
        "links are unbiased": "federated/test_links.py::test_links_are_unbiased",
        "padding is counted": "federated/test_links.py::test_padding_is_counted_and_kashin_does_not_double",
        "divisors": "federated/test_submodels.py::test_divisors",
        "a sub-model is the masked network": "federated/test_submodels.py::"
        "test_the_sub_model_computes_what_the_masked_network_does",
    },
    "ATOMO": {
        "the p sum to s": "codecs/test_atomo.py::test_probabilities_sum_to_the_budget_and_are_those_of_the_paper",
        "no random feasible p varies less": "codecs/test_atomo.py::"
        "test_no_random_feasible_probabilities_have_less_variance",
        "the variance is the analytic one (entries)": "codecs/test_atomo.py::"
        "test_variance_is_the_analytic_one_within_one_per_cent",
        "the variance is the analytic one, the mean the matrix (triples)": "reducers/test_spectral.py::"
        "test_variance_is_the_analytic_one_and_the_mean_is_the_matrix",
        "balanced: the second moment is ||c||_1^2 / s": f"{HERE}::test_the_second_moment_of_a_balanced_spectrum",
        "triples pay where ||A||_* sqrt(m + n) < ||A||_1,1": f"{HERE}::test_when_singular_triples_pay",
        "triples beat entries on low rank with noise": "reducers/test_spectral.py::"
        "test_spectral_atoms_beat_entries_at_equal_bytes_on_a_matrix_of_low_rank_with_noise",
        "QSGD and TernGrad are special cases": "codecs/test_atomo.py::test_special_cases",
        "clipping without redistribution varies more": "codecs/test_atomo.py::"
        "test_clipping_without_redistribution_spends_less_and_varies_more",
    },
    "Companions": {
        "1-bit SGD: the means above and below": f"{HERE}::test_two_means_are_those_of_both_sides",
        "EF-SGD: ||p - d||^2 = ||p||^2 - ||p||_1^2 / n": f"{HERE}::test_what_the_sign_with_its_scale_loses",
        "QSGD: variance at most min(n / s^2, sqrt(n) / s)": "codecs/test_statistics.py::test_variances_of_the_papers",
        "TernGrad: sums of up to 127 ranks fit into 8 bits": f"{HERE}::test_ternary_sums_of_127_ranks_fit_into_8_bits",
        "PowerSGD: two allreduces of r (m + n), whatever P": f"{HERE}::test_factors_do_not_grow_with_the_ranks",
        "PowerSGD is a power iteration with a warm start": "reducers/test_low_rank.py::"
        "test_the_warm_start_finds_the_leading_directions",
        "gTop-k: 2 log2 P rounds, 2 (P - 1) messages": f"{HERE}::test_a_tree_takes_two_log_p_rounds",
        "Ok-Topk: less than 6k": "reducers/test_split.py::test_a_cut_sum_moves_seven_bytes_an_entry_whatever_the_data",
        "natural: variance at most 1/8": "codecs/test_statistics.py::test_variance_is_that_of_the_formula",
        "DRIVE: pi/2 - 1 unbiased, 1 - 2/pi at the least": "codecs/test_rotation.py::"
        "test_sign_loses_what_theory_says_on_any_chunk",
        "MX: 4.25 and 8.25 bits; floor(log2 amax) - emax": f"{HERE}::test_shared_exponents_of_mx",
        "SparseLoCo: residuals times 0.95": "reducers/test_policies.py::"
        "test_decay_leaks_by_its_factor_whatever_stands_in_it",
        "1-bit Adam's exchange: errors of both stages stay": "reducers/test_law.py::test_sixty_steps_lose_nothing",
    },
}
"""By work: an identity, and the file and function that test it."""


@pytest.mark.parametrize("work", IDENTITIES)
def test_every_identity_has_its_test(work: str) -> None:
    assert not gone(IDENTITIES[work].values()), (
        "these identities have lost their tests: say in IDENTITIES which they have"
    )


def test_a_test_that_is_gone_is_found() -> None:
    places = [
        f"{HERE}::test_every_identity_has_its_test",
        f"{HERE}::test_of_nothing",
        "test_nothing.py::test_of_nothing",
    ]
    assert gone(places) == places[1:]


# ----------------------------------------------------------------------------------------------------------- models


def test_lenet_300_100_at_eight_per_cent_has_the_papers_bytes() -> None:
    """Han et al.: 1070 KB become 27 KB, 40x, and 32x with codes and distances of fixed widths."""
    torch = pytest.importorskip("torch")
    from mpicomp.models import Codebooks, Masks, compress_model
    from mpicomp.models.indices import to_gaps

    torch.manual_seed(0)
    sizes = [(784, 300), (300, 100), (100, 10)]
    net = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    for layer in net:
        torch.nn.init.normal_(layer.weight)
    plain = sum(tensor.nbytes for tensor in net.state_dict().values())
    assert plain == 4 * (784 * 300 + 300 * 100 + 100 * 10 + 410)
    Masks.magnitude(net, 0.92).apply(net)
    Codebooks.fit(net, bits=5).apply(net)
    symbols = sum(to_gaps(np.flatnonzero(layer.weight.detach().numpy()), 5).size for layer in net)
    fixed = symbols * (5 + 5) / 8 + 3 * 32 * 4 + 410 * 4
    found = len(compress_model(net))
    assert 32 <= plain / fixed <= 36
    assert 40 <= plain / found <= 43
    assert found <= 0.86 * fixed


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_packed_network_travels_at_a_bit_a_weight(ranks: int) -> None:
    torch = pytest.importorskip("torch")
    from mpicomp.models import BinaryActivation, BinaryLinear, fold
    from mpicomp.models.packed_file import broadcast, nbytes_of, weight_nbytes

    hidden = [BinaryActivation(), BinaryLinear(70, 37), torch.nn.BatchNorm1d(37)]
    network = fold(torch.nn.Sequential(*hidden, BinaryActivation(), BinaryLinear(37, 10)))
    signs = 37 * math.ceil(70 / 8) + 10 * math.ceil(37 / 8)
    assert weight_nbytes(network) == signs
    whole = 48 + 2 * 48 + signs + (4 * 37 + math.ceil(37 / 8)) + 8 * 10 + 16  # head, layers, thresholds, factors, sum
    assert nbytes_of(network) == whole

    def f(comm: Comm) -> int:
        broadcast(comm, network if comm.rank == 0 else None)
        return comm.traffic.bytes

    def share(nbytes: int, times: int = 1) -> int:
        return -(-times * nbytes * (ranks - 1) // ranks)

    (sent,) = set(Team(ranks).run(f))
    assert share(whole) < sent <= share(whole) + 2 * share(16, 2) + share(8)  # with agreements and the length


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_no_value_is_zero_and_a_zero_becomes_either_end_equally_often(bits: int) -> None:
    """DoReFa: 2^k - 1 is odd, so zero lies between two values; of one bit these are both ends."""
    torch = pytest.importorskip("torch")
    from mpicomp.models.dorefa import Noise, quantize_gradient

    x = np.zeros(65_536, np.float32)
    x[0] = 3
    samples = torch.from_numpy(x[None])
    codec = DoReFa(bits=bits, block=x.size)
    step = 2 * 3 / (2**bits - 1)
    for found in (
        quantize_gradient(samples, bits, Noise(seed=1).draw(samples))[0].numpy(),
        decoded(codec, encoded(codec, x), x.size, "float32"),
    ):
        assert np.allclose(np.abs(found[1:]), step / 2)
        assert abs((found[1:] > 0).mean() - 0.5) < 4 * 0.5 / x.size**0.5
        assert found[0] == pytest.approx(3)


@pytest.mark.parametrize(("sparsity", "left"), [(0.9, 5020), (0.975, 1255)])
def test_what_survives_of_the_mlp_on_digits(sparsity: float, left: int) -> None:
    torch = pytest.importorskip("torch")
    from mpicomp.models import Masks

    net = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in ((64, 300), (300, 100), (100, 10))))
    masks = Masks.magnitude(net, sparsity)
    assert (masks.size, masks.kept) == (50_200, left)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("density", "least"), [(0.01, 66), (0.001, 667)])
def test_an_entry_takes_less_than_a_record_of_48_bits(density: float, least: int) -> None:
    """DGC sends 32 bits of a value and 16 of a run of zeros; indices near their entropy are shorter."""
    size = 1 << 20
    sent = sum(field.nbytes for field in TopK(density).fields(size, "float32"))
    assert least <= 4 * size / sent < 32 / (density * 32)


@pytest.mark.parametrize("inner", ["gather(sampled_topk(density=0.01))", "two_stage(sampled_topk(density=0.01))"])
def test_what_was_dropped_is_sent_or_left(inner: str) -> None:
    """Aji and Heafield: over all steps, of all ranks, one way and two ways."""
    layout, x = layout_of({"w": (40, 50), "v": (700,)}), inputs(3, 60, 2700, "float32")
    history = run(Team(3), member(f"error_feedback({inner})"), layout, x)
    sent = history.totals[0].sum(0, dtype=np.float64) + history.residuals[:, -1].sum(0, dtype=np.float64)
    given = x.sum((0, 1), dtype=np.float64)
    np.testing.assert_allclose(sent, given, rtol=0, atol=1e-5 * np.abs(given).max())
    assert np.count_nonzero(history.totals[0, -1]) <= 3 * (20 + 7)


def test_the_papers_ratios_but_for_ranges_and_headers() -> None:
    """Caldas et al.: bits over 32 and the square of p; of their CNN's frames with ranges, biases and all."""
    shapes: dict[str, tuple[int, ...]] = {
        "c1.weight": (32, 1, 5, 5),
        "c1.bias": (32,),
        "c2.weight": (64, 32, 5, 5),
        "c2.bias": (64,),
        "f1.weight": (512, 3136),
        "f1.bias": (512,),
        "f2.weight": (10, 512),
        "f2.bias": (10,),
    }
    network = Network([conv("c1"), conv("c2"), flatten(), linear("f1"), linear("f2")], shapes)
    choice = network.choose(0.75, Key())
    shares = {name: math.prod(choice.shapes[name]) / math.prod(shape) for name, shape in shapes.items()}
    assert {name for name, share in shares.items() if share == 0.75**2} == {"c2.weight", "f1.weight"}
    dense, sub = 4 * sum(map(math.prod, shapes.values())), choice.extract(zeros(shapes))
    for bits, least, paper in ((4, 13.5, 14.2), (2, 25, 28.4)):
        assert 32 / bits / 0.75**2 == pytest.approx(paper, abs=0.05)
        frame = Bundle(lossy(bits), choice.shapes, "float32", "test").encode(sub, Key())
        assert least <= dense / len(frame) <= paper


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_the_second_moment_of_a_balanced_spectrum(budget: int) -> None:
    """ATOMO: where |c_i| s <= ||c||_1 for all i, the sum of c^2 / p is ||c||_1^2 / s; a steep spectrum has more."""
    c = np.random.default_rng(budget).uniform(1, 2, 40)
    assert c.max() * budget <= c.sum()
    assert np.sum(c**2 / probabilities(c, budget)) == pytest.approx(c.sum() ** 2 / budget, rel=1e-12)
    steep = 0.5 ** np.arange(40.0)
    if budget > 1:
        assert np.sum(steep**2 / probabilities(steep, budget)) > 1.1 * steep.sum() ** 2 / budget


@pytest.mark.parametrize("rank", [1, 2, 4, 20])
def test_when_singular_triples_pay(rank: int) -> None:
    """ATOMO: at equal floats s (m + n), both balanced, where ||A||_* sqrt(m + n) is below ||A||_1,1, and only there."""
    rng, shape = np.random.default_rng(rank), (30, 20)
    a = np.sign(rng.standard_normal(shape))
    if rank < 20:  # signs of a block pattern: entries of one size, and few singular values
        a = np.kron(np.sign(rng.standard_normal((rank, rank))), np.ones((30 // rank + 1, 20 // rank)))[:30, :20]
    values, entries = np.linalg.svd(a, compute_uv=False), np.abs(a).ravel()
    triples = float(np.sum(values[values > 1e-9] ** 2 / probabilities(values[values > 1e-9], 1)))
    alone = float(np.sum(entries**2 / probabilities(entries, sum(shape))))
    assert triples == pytest.approx(values.sum() ** 2, rel=1e-9)
    pays = values.sum() * math.sqrt(sum(shape)) < entries.sum()
    assert (triples < alone) == pays
    assert pays == (rank < 20)


# ------------------------------------------------------------------------------------------------------- companions


def test_two_means_are_those_of_both_sides() -> None:
    x = normal(3000, "float64") + 0.3
    found = decoded(Sign(two_means=True), encoded(Sign(two_means=True), x), x.size, "float64")
    np.testing.assert_allclose(found, np.where(x < 0, x[x < 0].mean(), x[x >= 0].mean()), rtol=1e-12)
    assert found.sum() == pytest.approx(x.sum())


def test_what_the_sign_with_its_scale_loses() -> None:
    x = normal(3000, "float64")
    found = decoded(Sign(), encoded(Sign(), x), x.size, "float64")
    np.testing.assert_allclose(found, np.abs(x).mean() * np.where(x < 0, -1, 1), rtol=1e-12)
    left = np.sum((x - found) ** 2)
    assert left == pytest.approx(np.sum(x**2) - np.abs(x).sum() ** 2 / x.size, rel=1e-12)


def test_ternary_sums_of_127_ranks_fit_into_8_bits() -> None:
    assert [Integer(bits=2).width(ranks) for ranks in (1, 63, 127, 128)] == [2, 7, 8, 9]


@pytest.mark.parametrize("ranks", [2, 5, 64])
def test_factors_do_not_grow_with_the_ranks(ranks: int) -> None:
    cost = member("low_rank(rank=2)").cost(Layout.single((60, 40)), "float32", Topology.flat(ranks), 0)
    assert cost.mpi == (4 * 2 * 60, 4 * 2 * 40)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 64])
def test_a_tree_takes_two_log_p_rounds(ranks: int) -> None:
    """gTop-k: 2 k log P on the longest way against k (P - 1) of a gather; of all ranks 2 (P - 1) messages."""
    layout, depth = Layout.single((100_000,)), math.ceil(math.log2(ranks))
    tree, gather = (
        [member(f"{name}(topk(density=0.01))").cost(layout, "float32", Topology.flat(ranks), me) for me in range(ranks)]
        for name in ("tree", "gather")
    )
    message = gather[0].nbytes / (ranks - 1)
    assert {cost.rounds for cost in tree} == {2 * depth}
    assert sum(cost.nbytes for cost in tree) == 2 * (ranks - 1) * message
    assert max(cost.nbytes for cost in tree) <= max(1, depth) * message


@pytest.mark.parametrize(
    ("codec", "bits", "emax", "top"), [(MXFP4(), 4.25, 2, 6), (MXFP8(), 8.25, 8, 448), (MXFP8("e5m2"), 8.25, 15, 57344)]
)
def test_shared_exponents_of_mx(codec: Any, bits: float, emax: int, top: float) -> None:
    """OCP MX: 32 elements share 2^(floor(log2 amax) - emax), so that amax lands in [2^emax, 2^(emax + 1))."""
    assert sum(field.nbytes for field in codec.fields(5120, "float32")) * 8 / 5120 == bits
    x = normal(5120, "float32") * np.float32(1e-3)
    exponents, _ = payload = encoded(codec, x)
    largest = np.abs(x.reshape(-1, 32)).max(1)
    assert np.array_equal(exponents.astype(int) - 127, np.floor(np.log2(largest)) - emax)
    groups = np.abs(decoded(codec, payload, x.size, "float32").reshape(-1, 32)).max(1)
    scaled = groups / np.exp2(exponents.astype(np.float64) - 127)
    assert scaled.max() == top
    assert scaled.min() >= 2**emax
