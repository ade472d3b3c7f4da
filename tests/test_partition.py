import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmfl_lite.data import longtail, partition
from mllmfl_lite.teaching.compare import reported

CIFAR10_IF100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def labels_of(counts):
    return np.repeat(np.arange(len(counts)), counts)


# ------------------------------------------------------------------------------------------------ the long tail


def test_counts_of_the_benchmarks():
    assert longtail.long_tail_counts(10, 5000, 100) == CIFAR10_IF100
    assert longtail.long_tail_counts(10, 5000, 50) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert longtail.long_tail_counts(10, 5000, 10) == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]


@pytest.mark.parametrize(("dataset", "classes", "most"), [("cifar10", 10, 5000), ("cifar100", 100, 500)])
def test_totals_of_the_benchmarks(dataset, classes, most):
    for factor, total in reported()["benchmark_sizes"][dataset].items():
        assert sum(longtail.long_tail_counts(classes, most, float(factor))) == total


@given(st.integers(2, 200), st.integers(1, 5000), st.floats(1, 1000))
def test_counts_fall_from_head_to_tail(classes, most, factor):
    counts = longtail.long_tail_counts(classes, most, factor)
    assert counts[0] == most and len(counts) == classes
    assert counts == sorted(counts, reverse=True)
    assert abs(counts[-1] - most / factor) <= 1


@pytest.mark.parametrize("factor", [0.99, 0, -5, float("nan")])
def test_imbalance_under_one_is_refused(factor):
    with pytest.raises(ValueError, match=r"imbalance_factor .* at least 1"):
        longtail.long_tail_counts(10, 100, factor)


def test_inverted_imbalance_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 100"):
        longtail.long_tail_counts(10, 100, 0.01)


def test_long_tail_subset_has_the_counts_and_no_image_twice():
    labels = np.random.default_rng(0).permutation(labels_of([500] * 10))
    chosen = longtail.long_tail_subset(labels, 10, 100, seed=3)
    assert np.bincount(labels[chosen]).tolist() == longtail.long_tail_counts(10, 500, 100)
    assert len(set(chosen.tolist())) == len(chosen)


def test_subset_depends_on_the_seed_alone():
    labels = labels_of([50] * 4)
    first, again, other = (longtail.long_tail_subset(labels, 4, 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_more_classes_than_labels_is_refused():
    with pytest.raises(ValueError, match=r"every class needs an image; num_classes is 5"):
        longtail.long_tail_subset(labels_of([10, 10, 10]), 5, 10, seed=0)


def test_a_tail_that_rounds_to_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves the last class without an image"):
        longtail.long_tail_subset(labels_of([20] * 5), 5, 50, seed=0)


def test_balanced_subset_is_balanced():
    chosen = longtail.balanced_subset(labels_of([30] * 4), 4, 42, seed=0)
    assert sorted(np.bincount(labels_of([30] * 4)[chosen]).tolist()) == [10, 10, 11, 11]
    with pytest.raises(ValueError, match="smallest class has 30"):
        longtail.balanced_subset(labels_of([30] * 4), 4, 200, seed=0)


# ------------------------------------------------------------------------------------------------ splits

counts_lists = st.lists(st.integers(1, 60), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    counts_lists, st.integers(1, 6), st.floats(0.001, 1000), st.integers(0, 5), st.sampled_from(list(partition.SPLITS))
)
def test_every_split_is_a_partition(counts, clients, alpha, seed, kind):
    labels = labels_of(counts)
    try:
        split = partition.split_clients(kind, labels, clients, alpha, seed)
    except ValueError as error:
        assert kind in ("dirichlet", "one_class_per_client") or clients > len(labels)
        assert str(clients) in str(error)
        return
    assert len(split) == clients and all(len(own) for own in split)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(len(labels)))


@settings(max_examples=40, deadline=None)
@given(counts_lists, st.integers(1, 6), st.floats(0.01, 100), st.booleans())
def test_equal_splits_have_equal_sizes(counts, clients, alpha, capped):
    labels = labels_of(counts)
    if clients > len(labels):
        return
    sizes = [len(own) for own in partition.dirichlet_equal(labels, clients, alpha, 0, capped)]
    assert max(sizes) - min(sizes) <= 1


def test_benchmark_clients_hold_620_or_621():
    split = partition.dirichlet_equal(labels_of(CIFAR10_IF100), 20, 0.5, 7)
    assert {len(own) for own in split} == {620, 621}


def test_the_capped_split_gives_the_baselines_figures_and_the_uncapped_does_not():
    theirs, labels = reported()["baselines_split"], labels_of(CIFAR10_IF100)
    for capped, agrees in ((True, True), (False, False)):
        splits = [partition.dirichlet_equal(labels, 20, 0.5, s, capped) for s in range(100)]
        held = np.array([[np.bincount(labels[own], minlength=10) > 0 for own in split] for split in splits])
        means = held.sum(2).mean(1)  # classes of a client, one mean a split
        assert (abs(means.mean() - theirs["classes_per_client_mean"]) < 2 * means.std()) == agrees
        holders = held.sum(1).mean(0)
        assert (np.abs(holders - theirs["clients_per_class"]).mean() < 1.5) == agrees


def test_dirichlet_shares_follow_alpha():
    """Var of a symmetric Dirichlet share: (1/K)(1 - 1/K) / (K alpha + 1); measured on one large class."""
    labels, clients, alpha = np.zeros(20_000, int), 5, 2.0
    shares = np.array([
        [len(own) / 20_000 for own in partition.dirichlet(labels, clients, alpha, s)] for s in range(300)
    ])  # fmt: skip
    assert shares.mean(0) == pytest.approx(np.full(clients, 0.2), abs=0.03)
    assert shares.var() == pytest.approx(0.2 * 0.8 / (clients * alpha + 1), rel=0.15)


def test_one_class_per_client():
    labels = labels_of([9, 6, 3])
    split = partition.one_class_per_client(labels, 5, seed=0)
    assert [set(labels[own].tolist()) for own in split] == [{0}, {1}, {2}, {0}, {1}]
    with pytest.raises(ValueError, match="a client for each of the 3 classes"):
        partition.one_class_per_client(labels, 2, seed=0)
    with pytest.raises(ValueError, match=r"clients \[11\] of 12 have none"):
        partition.one_class_per_client(labels_of([9, 6, 3]), 12, seed=0)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), 1e308, float("inf")])
@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_equal"])
def test_alpha_must_be_positive(kind, alpha):
    with pytest.raises(ValueError, match="must be positive, at most"):
        partition.split_clients(kind, labels_of([10, 10]), 2, alpha, 0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet_equal"])
def test_more_clients_than_images_is_refused(kind):
    with pytest.raises(ValueError, match=r"7 clients .* cannot share 6 images; use 1 to 6 clients"):
        partition.split_clients(kind, labels_of([3, 3]), 7, 1.0, 0)


def test_dirichlet_that_never_fills_everybody_says_what_to_do():
    with pytest.raises(ValueError, match=r"5 draws of Dirichlet\(0.001\).*use a larger alpha"):
        partition.dirichlet(labels_of([10, 10]), 8, 0.001, 0, max_draws=5)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split named 'random'; there are iid"):
        partition.split_clients("random", labels_of([3, 3]), 2, 1.0, 0)


def test_an_empty_client_is_named():
    with pytest.raises(ValueError, match=r"clients \[1\] of 2 have none"):
        partition.check_split([np.arange(3), np.arange(0)])
    with pytest.raises(ValueError, match="every client needs"):
        partition.check_split([])


# ------------------------------------------------------------------------------------------------ groups and figures


def test_shot_groups_at_the_thresholds():
    groups = longtail.shot_groups(np.array([500, 101, 100, 20, 19, 1]))
    assert groups == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


def test_thirds_of_ten_classes_and_of_unsorted_counts():
    assert [len(g) for g in longtail.rank_thirds(CIFAR10_IF100).values()] == [4, 3, 3]
    assert longtail.rank_thirds([5, 90, 20]) == {"head": [1], "middle": [2], "tail": [0]}
