"""Runs and products of a channel-merged matrix, against its plain definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.channels.row_layout import layout_rows
from modeling_channel_merged import channel_ops
from modeling_channel_merged.channel_ops import (
    COPY_MIN_TOKENS,
    FEW_TOKENS,
    expert_runs,
    fill_missing,
    gather_channels,
    map_experts,
    reference_linear,
    run_linear,
    runs_of,
)

SIZES = [1, 63, 100]
# Of one product: one to each side of every number that decides its path.
MANY = [COPY_MIN_TOKENS, 3 * COPY_MIN_TOKENS, 8 * COPY_MIN_TOKENS]
TOKENS = [1, 2, 5, FEW_TOKENS, FEW_TOKENS + 1, 40, *MANY]
NUM_EXPERTS = [2, 3, 4, 5]


def partition_labels(num_experts):
    """All ways to split the experts into groups, as labels."""
    labels = [(0,)]
    for _ in range(num_experts - 1):
        labels = [head + (label,) for head in labels for label in range(max(head) + 2)]
    return labels


def all_owner_patterns(num_experts):
    """(N, P) groups in which every set partition of the experts, and so every owner set, occurs once."""
    return torch.tensor(partition_labels(num_experts)).T


def random_groups(num_experts, num_channels, seed):
    generator = torch.Generator().manual_seed(seed)
    patterns = all_owner_patterns(num_experts)
    return patterns[:, torch.randint(patterns.shape[1], (num_channels,), generator=generator)]


def drop_channels(channel_index, seed):
    """The same index with some channels missing, never all of an expert's."""
    generator = torch.Generator().manual_seed(seed)
    missing = torch.rand(channel_index.shape, generator=generator) < 0.3
    missing[:, 0] = False
    return channel_index.masked_fill(missing, -1)


def random_matrix(num_experts, num_channels, width, seed, integers=False, missing=False):
    """Weight (R, I), bias (R,) and channel_index (N, O)."""
    layout = layout_rows(random_groups(num_experts, num_channels, seed))
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(layout.row_channel)
    if integers:
        weight = torch.randint(-3, 4, (num_rows, width), generator=generator).float()
        bias = torch.randint(-3, 4, (num_rows,), generator=generator).float()
    else:
        weight = torch.randn(num_rows, width, generator=generator)
        bias = torch.randn(num_rows, generator=generator)
    return weight, bias, drop_channels(layout.channel_index, seed) if missing else layout.channel_index


def plain_error(weight, bias, index, dtype):
    """Largest error of the dense layers of all experts, for tokens one by one and together, against float64."""
    hidden = torch.randn(len(index), 64, weight.shape[1], generator=torch.Generator().manual_seed(6)).to(dtype)
    experts = torch.arange(len(index))
    exact = reference_linear(hidden.double(), weight.double(), bias.double(), index, experts)
    together = reference_linear(hidden, weight, bias, index, experts)
    one_by_one = [reference_linear(token, weight, bias, index, experts) for token in hidden.split(1, dim=1)]
    return max((together - exact).abs().max(), (torch.cat(one_by_one, dim=1) - exact).abs().max())


def own_products(weight, bias, all_runs):
    """For `map_experts`: each expert's product."""
    return lambda expert, inputs: run_linear(inputs, weight, bias, all_runs[expert])


def number_of_runs(channel_index):
    return [len(runs_of(index.unique())) for index in channel_index]


group_columns = st.integers(1, 6).flatmap(
    lambda num_experts: st.lists(
        st.lists(st.integers(0, num_experts - 1), min_size=num_experts, max_size=num_experts), min_size=1, max_size=40
    )
)


class TestExpertRuns:
    @pytest.mark.parametrize(
        "num_experts, runs", [(1, [1]), (2, [1, 1]), (3, [2, 1, 1]), (4, None), (5, None), (6, None)]
    )
    def test_fewest_runs_when_every_owner_set_occurs(self, num_experts, runs):
        """2^(N-1) in all: the path through the owner sets changes one expert a step, and starts and ends at one."""
        counts = number_of_runs(layout_rows(all_owner_patterns(num_experts)).channel_index)
        assert sum(counts) == 2 ** (num_experts - 1)
        if runs is not None:
            assert sorted(counts) == sorted(runs)

    @settings(max_examples=200, deadline=None)
    @given(group_columns)
    def test_never_more_runs(self, columns):
        """Whatever the groups: leaving owner sets out never splits a run. One run each for two experts."""
        groups = torch.tensor(columns).T
        counts = number_of_runs(layout_rows(groups).channel_index)
        assert min(counts) >= 1 and sum(counts) <= max(1, 2 ** (len(groups) - 1))

    @settings(max_examples=100, deadline=None)
    @given(group_columns, st.booleans(), st.integers(0, 5), st.sampled_from([1, 4, 16]))
    def test_slices_and_gather_give_the_index_back(self, columns, missing, seed, step):
        """Slices are disjoint, ascending and hold the expert's rows, one run nothing else; the gather finds each."""
        index = layout_rows(torch.tensor(columns).T).channel_index
        num_rows = int(index.max()) + 1
        if missing:
            index = drop_channels(index, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel_ops, "RUN_STEP", step)
            all_runs = expert_runs(index, num_rows)
        for expert, runs in enumerate(all_runs):
            has = index[expert] >= 0
            own = index[expert][has].long().unique()
            assert all(a < b for a, b in runs.slices)
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs.slices))
            if len(exact := runs_of(own)) == 1 or step == 1:
                assert list(runs.slices) == exact
            else:
                assert all(a % step == 0 and (b % step == 0 or b == num_rows) for a, b in runs.slices)
            rows = torch.cat([torch.arange(a, b) for a, b in runs.slices])
            assert torch.isin(own, rows).all() and len(rows) <= len(own) + 2 * (step - 1) * len(exact)
            gather = torch.arange(index.shape[1]) if runs.gather is None else runs.gather
            assert torch.equal(rows[gather][has], index[expert][has].long())
            assert (runs.missing is None) == bool(has.all())
            assert runs.missing is None or torch.equal(runs.missing, ~has)

    def test_channels_already_in_order_need_no_gather(self):
        shared = layout_rows(torch.zeros(3, 10, dtype=torch.int64)).channel_index
        for runs in expert_runs(shared, 10):
            assert runs.slices == ((0, 10),) and runs.gather is None and runs.missing is None
            assert torch.equal(runs.rows, torch.arange(10))


class TestProducts:
    @pytest.mark.parametrize("missing", [False, True], ids=["all_channels", "missing_channels"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("width", SIZES)
    @pytest.mark.parametrize("num_channels", SIZES)
    @pytest.mark.parametrize("num_experts", NUM_EXPERTS)
    def test_whole_numbers_are_exact(self, num_experts, num_channels, width, dtype, missing):
        """Where no product rounds, every path gives the same bits: rows and outputs only move."""
        weight, bias, index = random_matrix(num_experts, num_channels, width, 0, integers=True, missing=missing)
        weight, bias = weight.to(dtype), bias.to(dtype)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randint(-2, 3, (num_experts, 3, width), generator=generator).to(dtype)
        experts = torch.arange(num_experts)
        all_runs = expert_runs(index, len(weight))
        for some_bias in (None, bias):
            expected = reference_linear(hidden, weight, some_bias, index, experts)
            assert expected.shape == (num_experts, 3, num_channels) and expected.dtype == dtype
            ours = torch.stack([run_linear(row, weight, some_bias, all_runs[e]) for e, row in enumerate(hidden)])
            assert torch.equal(ours, expected)
            assert torch.equal(gather_channels(F.linear(hidden, weight, some_bias), index, experts), expected)
            counts = tuple((expert, 1) for expert in range(num_experts))
            own = own_products(weight, some_bias, all_runs)
            assert torch.equal(map_experts(own, hidden, counts, experts), expected)

    @pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("num_tokens", [0, *TOKENS])
    @torch.no_grad()
    def test_whole_numbers_are_exact_without_gradients(self, num_tokens, dtype, has_bias):
        """The same on the paths of inference: each choice by the number of tokens."""
        for num_experts in (3, 4, 7):
            weight, bias, index = random_matrix(num_experts, 101, 40, 0, integers=True)
            weight, bias = weight.to(dtype), bias.to(dtype) if has_bias else None
            generator = torch.Generator().manual_seed(1)
            hidden = torch.randint(-2, 3, (num_experts, num_tokens, 40), generator=generator).to(dtype)
            expected = reference_linear(hidden, weight, bias, index, torch.arange(num_experts))
            for expert, runs in enumerate(expert_runs(index, len(weight))):
                assert torch.equal(run_linear(hidden[expert], weight, bias, runs), expected[expert])
            rows = F.linear(hidden, weight, bias)
            assert torch.equal(gather_channels(rows, index, torch.arange(num_experts)), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("num_tokens", TOKENS)
    @torch.no_grad()
    def test_one_run_is_bit_equal_to_the_dense_layer(self, num_tokens, dtype):
        """Two experts: each is one run, whatever they share. (At odd sizes MKL rounds the last rows otherwise.)"""
        weight, bias, index = random_matrix(2, 128, 320, 3)
        weight, bias = weight.to(dtype), bias.to(dtype)
        hidden = torch.randn(num_tokens, 320, generator=torch.Generator().manual_seed(4)).to(dtype)
        for expert, runs in enumerate(expert_runs(index, len(weight))):
            rows = index[expert].long()
            assert len(runs.slices) == 1 and runs.gather is not None
            dense = F.linear(hidden, weight[rows], bias[rows])
            assert torch.equal(run_linear(hidden, weight, bias, runs), dense)

    @pytest.mark.parametrize("num_experts", NUM_EXPERTS)
    def test_reference_is_each_experts_own_matrix(self, num_experts):
        """The definition, written once more with every expert's dense weight built by hand."""
        weight, bias, index = random_matrix(num_experts, 63, 20, 2, integers=True)
        hidden = torch.randint(-2, 3, (num_experts, 20), generator=torch.Generator().manual_seed(3)).float()
        output = reference_linear(hidden, weight, bias, index, torch.arange(num_experts))
        for expert in range(num_experts):
            dense = torch.stack([weight[row] for row in index[expert].tolist()])
            dense_bias = torch.stack([bias[row] for row in index[expert].tolist()])
            assert torch.equal(output[expert], F.linear(hidden[expert], dense, dense_bias))

    @pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("num_tokens", TOKENS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("width", [63, 100, 2000])
    def test_error_is_at_most_twice_the_plain_products(self, width, dtype, num_tokens, gradients):
        """Both against float64; the plain product with its own error for one token and for many."""
        for num_experts in (3, 4):
            weight, bias, index = random_matrix(num_experts, 100, width, 4)
            weight, bias = weight.to(dtype), bias.to(dtype)
            hidden = torch.randn(num_experts, num_tokens, width, generator=torch.Generator().manual_seed(5)).to(dtype)
            experts = torch.arange(num_experts)
            exact = reference_linear(hidden.double(), weight.double(), bias.double(), index, experts)
            plain = plain_error(weight, bias, index, dtype)
            all_runs = expert_runs(index, len(weight))
            with torch.set_grad_enabled(gradients):
                by_runs = torch.stack([run_linear(row, weight, bias, all_runs[e]) for e, row in enumerate(hidden)])
                rows = F.linear(hidden, weight, bias)
            assert (by_runs - exact).abs().max() <= 2 * plain
            assert (gather_channels(rows, index, experts) - exact).abs().max() <= 2 * plain

    @pytest.mark.parametrize("num_experts", NUM_EXPERTS)
    def test_gradients(self, num_experts):
        """The run path and the all-rows path give the reference's gradients of inputs, weight and bias."""
        weight, bias, index = random_matrix(num_experts, 63, 20, 6, integers=True)
        hidden = torch.randint(-2, 3, (num_experts, 5, 20), generator=torch.Generator().manual_seed(7)).float()
        into = torch.randint(-2, 3, (num_experts, 5, 63), generator=torch.Generator().manual_seed(8)).float()
        experts, all_runs = torch.arange(num_experts), expert_runs(index, len(weight))

        def by_runs(hidden, weight, bias):
            return torch.stack([run_linear(row, weight, bias, all_runs[e]) for e, row in enumerate(hidden)])

        def by_all_rows(hidden, weight, bias):
            return gather_channels(F.linear(hidden, weight, bias), index, experts)

        def by_reference(hidden, weight, bias):
            return reference_linear(hidden, weight, bias, index, experts)

        gradients = []
        for product in (by_reference, by_runs, by_all_rows):
            inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            gradients.append(torch.autograd.grad(product(*inputs), inputs, into))
        for ours in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ours, gradients[0], strict=True))

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
    def test_leading_dimensions(self, shape):
        weight, bias, index = random_matrix(4, 63, 20, 9, integers=True, missing=True)
        generator = torch.Generator().manual_seed(10)
        hidden = torch.randint(-2, 3, (4, *shape, 20), generator=generator).float()
        experts = torch.tensor([3, 0, 0, 2])
        expected = reference_linear(hidden, weight, bias, index, experts)
        assert expected.shape == (4, *shape, 63)
        assert torch.equal(gather_channels(F.linear(hidden, weight, bias), index, experts), expected)
        all_runs = expert_runs(index, len(weight))
        for row, expert, output in zip(hidden, experts.tolist(), expected, strict=True):
            assert torch.equal(run_linear(row, weight, bias, all_runs[expert]), output)

    @pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
    def test_grouped_batch(self, gradients):
        """Several batch rows per expert in any order, and an expert without any."""
        weight, bias, index = random_matrix(5, 63, 20, 11, integers=True)
        hidden = torch.randint(-2, 3, (6, 2, 20), generator=torch.Generator().manual_seed(12)).float()
        hidden.requires_grad_(gradients)
        experts = torch.tensor([4, 0, 2, 4, 4, 2])
        expected = reference_linear(hidden, weight, bias, index, experts)
        counts, order = ((0, 1), (2, 2), (4, 3)), experts.argsort(stable=True)
        with torch.set_grad_enabled(gradients):
            outputs = map_experts(own_products(weight, bias, expert_runs(index, len(weight))), hidden, counts, order)
        assert torch.equal(outputs, expected)
        if gradients:
            ours, theirs = (torch.autograd.grad(output.sum(), hidden)[0] for output in (outputs, expected))
            assert torch.equal(ours, theirs)


class TestGatherChannels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("num_channels", SIZES)
    @pytest.mark.parametrize("num_experts", NUM_EXPERTS)
    def test_only_moves_data(self, num_experts, num_channels, dtype):
        index = layout_rows(random_groups(num_experts, num_channels, 13)).channel_index
        num_rows = int(index.max()) + 1
        row_outputs = torch.randn(6, 2, num_rows, generator=torch.Generator().manual_seed(14)).to(dtype)
        experts = torch.randint(num_experts, (6,), generator=torch.Generator().manual_seed(15))
        expected = torch.stack([row_outputs[b][:, index[e].long()] for b, e in enumerate(experts.tolist())])
        assert torch.equal(gather_channels(row_outputs, index, experts), expected)
        assert torch.equal(gather_channels(row_outputs, index, experts, may_miss=False), expected)

    def test_missing_channels_are_minus_infinity(self):
        """Also where the row that stands in for them holds NaN or infinity."""
        index = torch.tensor([[0, -1, 1], [-1, 1, 0]], dtype=torch.int32)
        row_outputs = torch.tensor([[float("nan"), 2.0], [float("inf"), 5.0]])
        output = gather_channels(row_outputs, index, torch.tensor([0, 1]))
        assert output[0, 0].isnan() and output[0, 1:].tolist() == [float("-inf"), 2.0]
        assert output[1].tolist() == [float("-inf"), 5.0, float("inf")]

    def test_fill_missing(self):
        output = torch.ones(2, 3)
        assert fill_missing(output, None) is output
        filled = fill_missing(output, torch.tensor([True, False, True]))
        assert torch.equal(filled.isneginf(), torch.tensor([True, False, True]).expand(2, 3))
        assert (output == 1).all()
