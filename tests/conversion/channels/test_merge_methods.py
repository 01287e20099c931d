"""Merging one group, against mergekit where all experts are one; trim thresholds and random masks on their own."""

import math

import pytest
import torch

from conversion.channels import merge_methods
from conversion.channels.keep_masks import keep_mask
from conversion.channels.merge_methods import MergeMethod, merge_rows, row_deltas

# Those that merge rows as they are; regmean needs what was measured of their inputs.
ROW_METHODS = tuple(name for name in merge_methods.MERGE_METHODS if name != "regmean")
SHAPES = [(1, 1), (1, 63), (63, 1), (100, 63), (7, 20001)]


def random_rows(num_members, num_channels, width, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(num_channels, width, generator=generator) * 0.02
    return base, base + 0.003 * torch.randn(num_members, num_channels, width, generator=generator)


def exact_thresholds(base, rows, density):
    """The definition, through a full sort of each member's tensor."""
    kept = max(1, int(density * base.numel()))
    magnitudes = row_deltas(base, rows).abs().flatten(1)
    return magnitudes.sort(dim=1, descending=True).values[:, kept - 1]


def mergekit_merge(name, base, rows, weights, **parameters):
    """mergekit's own result for whole tensors."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    if name == "linear":
        return api.merge_tensors(list(rows), "linear", parameters={"weight": weights, **parameters})
    inputs = [base, *rows]
    return api.merge_tensors(inputs, name, parameters={"weight": weights, **parameters}, base_index=0)


WEIGHTS = {
    "equal": [1.0, 1.0, 1.0, 1.0],
    "different": [0.3, 1.0, 0.7, 2.5],
    "signed": [1.0, -0.4, 0.8, 0.1],
    "zero": [1.0, 0.0, 0.5, 0.0],
}


class TestAgainstMergekit:
    """One group of all experts equals mergekit 0.1.5 on the same float32 tensors, for up to 4 to the last bit."""

    @pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
    @pytest.mark.parametrize("weighting", WEIGHTS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_linear(self, shape, weighting, normalize):
        base, rows = random_rows(4, *shape, seed=0)
        weights = WEIGHTS[weighting]
        expected = mergekit_merge("linear", base, rows, weights, normalize=normalize)
        merged = merge_rows(base, rows, torch.tensor(weights), MergeMethod("linear", normalize=normalize))
        assert torch.equal(merged, expected)

    @pytest.mark.parametrize("lambda_", [1.0, 0.5, -0.3])
    @pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
    @pytest.mark.parametrize("weighting", WEIGHTS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_task_arithmetic(self, shape, weighting, normalize, lambda_):
        base, rows = random_rows(4, *shape, seed=1)
        weights = WEIGHTS[weighting]
        method = MergeMethod("task_arithmetic", lambda_=lambda_, normalize=normalize)
        parameters = {"normalize": normalize, "lambda": lambda_}
        expected = mergekit_merge("task_arithmetic", base, rows, weights, **parameters)
        assert torch.equal(merge_rows(base, rows, torch.tensor(weights), method), expected)

    @pytest.mark.parametrize("lambda_", [1.0, 0.5])
    @pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
    @pytest.mark.parametrize("density", [0.05, 0.5, 0.7, 1.0])
    @pytest.mark.parametrize("weighting", WEIGHTS)
    @pytest.mark.parametrize("shape", [(1, 1), (63, 1), (100, 63)], ids=str)
    def test_ties(self, shape, weighting, density, normalize, lambda_):
        base, rows = random_rows(4, *shape, seed=2)
        thresholds = exact_thresholds(base, rows, density)
        kept = (row_deltas(base, rows).abs() >= thresholds[:, None, None]).flatten(1).sum(1)
        assert (kept == max(1, int(density * base.numel()))).all(), (
            "the comparison needs data without ties at the trim"
        )
        weights = WEIGHTS[weighting]
        method = MergeMethod("ties", density=density, lambda_=lambda_, normalize=normalize)
        parameters = {"density": density, "normalize": normalize, "lambda": lambda_}
        expected = mergekit_merge("ties", base, rows, weights, **parameters)
        assert torch.equal(merge_rows(base, rows, torch.tensor(weights), method, thresholds=thresholds), expected)

    @pytest.mark.parametrize("num_members", [1, 2, 3, 4, 5, 9])
    @pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
    def test_number_of_members(self, name, num_members):
        """From 5 deltas on torch.sum adds them in an order that depends on the place in the tensor; ours does not."""
        base, rows = random_rows(num_members, 20, 33, seed=3)
        weights = [1 / (member + 1) for member in range(num_members)]
        expected = mergekit_merge(name, base, rows, weights, normalize=True)
        merged = merge_rows(base, rows, torch.tensor(weights), MergeMethod(name))
        if num_members <= 4 or name == "linear":
            assert torch.equal(merged, expected)
            return
        # Two sums of M terms, each M - 1 roundings of at most the sum of magnitudes; a last rounding of the result.
        # The divisor is at least the smallest weight, 1 / M.
        terms = (row_deltas(base, rows).abs() * torch.tensor(weights)[:, None, None]).sum(0) * num_members
        bound = 2**-24 * (2 * num_members * terms + 2 * expected.abs())
        assert ((merged - expected).abs() <= bound).all()

    @pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
    def test_dare_without_a_drop(self, name):
        base, rows = random_rows(3, 20, 33, seed=4)
        expected = mergekit_merge(name, base, rows, [1.0, 0.5, 2.0], density=1.0, normalize=False)
        merged = merge_rows(base, rows, torch.tensor([1.0, 0.5, 2.0]), MergeMethod(name, normalize=False))
        assert torch.equal(merged, expected)


def reference_dare(base, rows, weights, keep, method):
    """DARE in float64 by its definition: drop, rescale by 1 / density, weigh, elect signs (dare_ties), sum or mean."""
    deltas = (rows.double() - base.double()) * keep / method.density * weights.double()[:, None, None]
    counts = torch.ones_like(deltas, dtype=torch.bool)
    if method.name == "dare_ties":
        majority = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        counts = deltas.sign() == majority
    mixed = (deltas * counts).sum(0)
    if method.normalize:
        divisor = (weights.double()[:, None, None] * counts).sum(0)
        mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
    return base.double() + method.lambda_ * mixed


class TestMergeRows:
    @pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
    @pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_dare_with_our_mask(self, shape, name, normalize):
        base, rows = random_rows(3, *shape, seed=5)
        weights = torch.tensor([1.0, 0.4, 2.0])
        keep = torch.stack([keep_mask(7, f"expert{e}", "w", 0, base.numel(), 0.7).view(shape) for e in range(3)])
        method = MergeMethod(name, density=0.7, lambda_=0.5, normalize=normalize)
        merged = merge_rows(base, rows, weights, method, keep=keep)
        expected = reference_dare(base, rows, weights, keep, method)
        # Seven float32 roundings of the deltas and one of the result; the sum's sign is far from a tie in this data.
        terms = (row_deltas(base, rows).abs().double() * weights[:, None, None]).sum(0) / 0.7
        bound = 2**-24 * (8 * terms + 2 * expected.abs())
        assert merged.dtype == torch.float32
        assert ((merged.double() - expected).abs() <= bound).all()

    @pytest.mark.parametrize("name", ROW_METHODS)
    def test_blocks_do_not_matter(self, name, monkeypatch):
        base, rows = random_rows(3, 40, 33, seed=6)
        density = 0.7 if name in merge_methods.SPARSE_METHODS else 1.0
        method = MergeMethod(name, density=density)
        keep = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.7
        given_ = {"thresholds": exact_thresholds(base, rows, density), "keep": keep}
        weights = torch.tensor([1.0, 0.5, 2.0])
        whole = merge_rows(base, rows, weights, method, **given_)
        monkeypatch.setattr(merge_methods, "BLOCK_ELEMENTS", 70)
        assert torch.equal(merge_rows(base, rows, weights, method, **given_), whole)
        for channel in (0, 39):
            part = {"thresholds": given_["thresholds"], "keep": keep[:, channel : channel + 1]}
            some = slice(channel, channel + 1)
            assert torch.equal(merge_rows(base[some], rows[:, some], weights, method, **part), whole[some])

    @pytest.mark.parametrize("name", ROW_METHODS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_merged_in_float32(self, dtype, name):
        """Lower precision changes the inputs and nothing else; they are not overwritten."""
        base, rows = (t.to(dtype) for t in random_rows(3, 10, 33, seed=7))
        before = base.clone(), rows.clone()
        density = 0.7 if name in merge_methods.SPARSE_METHODS else 1.0
        method = MergeMethod(name, density=density)
        given_ = {"thresholds": exact_thresholds(base, rows, density), "keep": rows > rows.mean()}
        weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
        merged = merge_rows(base, rows, weights, method, **given_)
        assert merged.dtype == torch.float32
        assert torch.equal(merged, merge_rows(base.float(), rows.float(), weights, method, **given_))
        assert torch.equal(base, before[0]) and torch.equal(rows, before[1])

    @pytest.mark.parametrize("name", ROW_METHODS)
    def test_float32_inputs_are_not_overwritten(self, name):
        base, rows = random_rows(2, 10, 33, seed=8)
        before = base.clone(), rows.clone()
        merge_rows(base, rows, torch.ones(2), MergeMethod(name, density=1.0))
        assert torch.equal(base, before[0]) and torch.equal(rows, before[1])

    def test_trim_keeps_ties_at_the_threshold(self):
        """Magnitudes equal to the threshold are kept, both signs; the next smaller float is not."""
        below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
        base = torch.zeros(1, 6)
        rows = torch.tensor([[[0.5, -0.5, below, -below, 0.0, 2.0]]])
        merged = merge_rows(
            base, rows, torch.ones(1), MergeMethod("ties", density=0.5), thresholds=torch.tensor([0.5])
        )
        assert merged.tolist() == [[0.5, -0.5, 0.0, 0.0, 0.0, 2.0]]

    @pytest.mark.parametrize("threshold", [0.0, 2**-149, 2**-140])
    def test_trim_at_the_smallest_thresholds(self, threshold):
        """Zero keeps all, and the smallest denormal keeps everything but zeros."""
        rows = torch.tensor([[[2**-149, -(2**-149), 2**-140, 0.0, 1.0]]])
        method = MergeMethod("ties", density=0.5)
        merged = merge_rows(torch.zeros(1, 5), rows, torch.ones(1), method, thresholds=torch.tensor([threshold]))
        expected = torch.where(rows[0].abs() >= threshold, rows[0], 0)
        assert torch.equal(merged, expected)

    def test_elects_the_heavier_sign(self):
        """By hand: weighted sums 3 - 2 = 1, 1 - 2 = -1 and 2 - 2 = 0, where plus wins."""
        base = torch.tensor([[10.0, 10.0, 10.0]])
        rows = base + torch.tensor([[[3.0, 1.0, 2.0]], [[-1.0, -1.0, -1.0]]])
        weights = torch.tensor([1.0, 2.0])
        summed = merge_rows(base, rows, weights, MergeMethod("ties", normalize=False))
        assert summed.tolist() == [[13.0, 8.0, 12.0]]
        mean = merge_rows(base, rows, weights, MergeMethod("ties", lambda_=0.5))
        assert mean.tolist() == [[11.5, 9.5, 11.0]]

    def test_bad_input(self):
        base, rows = random_rows(2, 3, 4, seed=9)
        with pytest.raises(ValueError, match="do not fit"):
            merge_rows(base[:, :3], rows, torch.ones(2), MergeMethod("linear"))
        with pytest.raises(ValueError, match="do not fit"):
            merge_rows(base, rows, torch.ones(3), MergeMethod("linear"))
        with pytest.raises(ValueError, match="needs one threshold for each of 2 rows"):
            merge_rows(base, rows, torch.ones(2), MergeMethod("ties", density=0.5))
        with pytest.raises(ValueError, match=r"needs a keep mask of shape \(2, 3, 4\)"):
            merge_rows(base, rows, torch.ones(2), MergeMethod("dare_ties", density=0.5), keep=torch.ones(2, 3).bool())
        with pytest.raises(ValueError, match="sum to 0"):
            merge_rows(base, rows, torch.tensor([1.0, -1.0]), MergeMethod("linear"))

    @pytest.mark.parametrize(
        "parameters, message",
        [
            ({"name": "slerp"}, "merge method is 'slerp', expected one of linear, task_arithmetic"),
            ({"name": "ties", "density": 0.0}, "density is 0.0, expected more than 0"),
            ({"name": "ties", "density": 1.5}, "density is 1.5"),
            ({"name": "ties", "lambda_": math.nan}, "lambda is nan, expected a finite number"),
            ({"name": "task_arithmetic", "density": 0.7}, "task_arithmetic keeps all of a delta"),
            ({"name": "linear", "lambda_": 0.5}, "linear merges rows and not deltas"),
        ],
        ids=lambda value: value["name"] if isinstance(value, dict) else "",
    )
    def test_bad_method(self, parameters, message):
        with pytest.raises(ValueError, match=message):
            MergeMethod(**parameters)

    def test_what_a_method_needs(self):
        needs = {name: MergeMethod(name, density=0.5) for name in merge_methods.SPARSE_METHODS}
        assert [name for name, method in needs.items() if method.needs_threshold] == ["ties"]
        assert [name for name, method in needs.items() if method.needs_mask] == ["dare_linear", "dare_ties"]
        assert not any(MergeMethod(name).needs_threshold for name in merge_methods.MERGE_METHODS)
        assert not any(MergeMethod(name).needs_mask for name in merge_methods.MERGE_METHODS)
