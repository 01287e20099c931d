"""Merging one group, against mergekit where all experts are one; trim thresholds and random masks on their own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.channels import keep_masks, magnitude_threshold, merge_methods
from conversion.channels.keep_masks import keep_mask
from conversion.channels.magnitude_threshold import MagnitudeThreshold
from conversion.channels.merge_methods import MergeMethod, merge_rows, row_deltas

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

    @pytest.mark.parametrize("name", merge_methods.MERGE_METHODS)
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

    @pytest.mark.parametrize("name", merge_methods.MERGE_METHODS)
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

    @pytest.mark.parametrize("name", merge_methods.MERGE_METHODS)
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


def trim_threshold(values, density, chunk):
    """The value, and how many reads it took."""
    threshold = MagnitudeThreshold(values.numel(), density)
    reads = 0
    while not threshold.complete:
        reads += 1
        for part in values.reshape(-1).split(chunk):
            threshold.update(part)
    return threshold.value, reads


def kth_largest(values, density):
    kept = max(1, int(density * values.numel()))
    if kept == values.numel():
        return 0.0
    return torch.kthvalue(values.reshape(-1).abs(), values.numel() - kept + 1).values.item()


def threshold_cases():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20001, generator=generator)
    zeros = normal.clone()
    zeros[::3] = 0
    half = (normal * 0.02).bfloat16().float() - (normal.flip(0) * 0.02).bfloat16().float()
    bits = torch.randint(0, 0x7F800000, (20001,), generator=generator, dtype=torch.int32)
    return {
        "normal": normal * 0.003,
        "one": normal[:1],
        "two": normal[:2],
        "odd": normal[:63],
        "heavy_ties": (normal * 3).round(),
        "third_zero": zeros,
        "all_zero": torch.zeros(1000),
        "all_equal": torch.full((999,), -0.125),
        "denormal": normal * 1e-42,
        "denormal_and_zero": zeros * 1e-44,
        "bfloat16_differences": half,
        "float16_differences": (normal * 0.02).half().float() - (normal.flip(0) * 0.02).half().float(),
        "any_bits": bits.view(torch.float32),
        "huge": normal * 1e37,
    }


THRESHOLD_CASES = threshold_cases()


class TestMagnitudeThreshold:
    @pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.7, 0.9999, 1.0])
    @pytest.mark.parametrize("case", THRESHOLD_CASES)
    def test_is_the_kth_largest_magnitude(self, case, density):
        values = THRESHOLD_CASES[case]
        value, reads = trim_threshold(values, density, chunk=3000)
        assert value == kth_largest(values, density)
        assert reads <= 1

    @pytest.mark.parametrize("held", [16, 1000, 7000])
    @pytest.mark.parametrize("density", [0.1, 0.7, 0.9999])
    @pytest.mark.parametrize("case", THRESHOLD_CASES)
    def test_tensors_larger_than_what_is_held(self, case, density, held, monkeypatch):
        """The same value when nearly everything is only counted, in at most two reads."""
        values = THRESHOLD_CASES[case]
        monkeypatch.setattr(magnitude_threshold, "MAX_HELD", held)
        for chunk in (977, 30000):
            value, reads = trim_threshold(values, density, chunk)
            assert value == kth_largest(values, density)
            assert reads <= 2

    def test_one_read_is_enough(self, monkeypatch):
        """A twentieth of the tensor tells where the threshold is to look for."""
        values = THRESHOLD_CASES["normal"]
        monkeypatch.setattr(magnitude_threshold, "MAX_HELD", 1000)
        assert trim_threshold(values, 0.7, 500) == (kth_largest(values, 0.7), 1)

    def test_rows_unlike_the_first_take_a_second_read(self, monkeypatch):
        """The first rows say nothing about the rest: the window misses, the second read is exact."""
        values = THRESHOLD_CASES["normal"].sort().values
        monkeypatch.setattr(magnitude_threshold, "MAX_HELD", 1000)
        assert trim_threshold(values, 0.7, 500) == (kth_largest(values, 0.7), 2)

    @settings(max_examples=100, deadline=None)
    @given(
        values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
        density=st.floats(0.01, 1.0),
        chunk=st.integers(1, 60),
    )
    def test_any_floats(self, values, density, chunk):
        values = torch.tensor(values, dtype=torch.float32)
        assert trim_threshold(values, density, chunk)[0] == kth_largest(values, density)

    def test_keeps_mergekits_number_without_ties(self):
        values = torch.randperm(1001, generator=torch.Generator().manual_seed(1)).float() - 500.25
        for density in (0.001, 0.3, 0.7, 0.999):
            value, _ = trim_threshold(values, density, 100)
            assert int((values.abs() >= value).sum()) == max(1, int(density * 1001))

    def test_takes_any_shape(self):
        values = THRESHOLD_CASES["normal"][:20000].view(100, 200)
        threshold = MagnitudeThreshold(20000, 0.7)
        threshold.update(values[:, :100])
        assert not threshold.complete
        threshold.update(values[:, 100:])
        assert threshold.value == kth_largest(values, 0.7)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="numel is 0"):
            MagnitudeThreshold(0, 0.5)
        with pytest.raises(ValueError, match="density is 0"):
            MagnitudeThreshold(5, 0)
        threshold = MagnitudeThreshold(5, 0.5)
        with pytest.raises(ValueError, match="0 of 5 elements were read"):
            _ = threshold.value
        with pytest.raises(ValueError, match="6 elements were read, expected 5"):
            threshold.update(torch.zeros(6))
        with pytest.raises(ValueError, match="expected torch.float32"):
            threshold.update(torch.zeros(5, dtype=torch.bfloat16))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_refuses_non_finite_deltas(self, value):
        with pytest.raises(ValueError, match="not finite"):
            MagnitudeThreshold(3, 0.5).update(torch.tensor([1.0, value, 2.0]))


MASK_32 = 2**32 - 1


def python_hash(index, key, second_key):
    """The mask's hash of one counter in Python integers, as an unsigned word."""
    word = (index + key) & MASK_32
    word ^= word >> 17
    word = (word * 0xED5AD4BB) & MASK_32
    word ^= second_key
    word ^= word >> 11
    word = (word * 0xAC4C1B51) & MASK_32
    word ^= word >> 15
    word = (word * 0x31848BAB) & MASK_32
    return word ^ 0x80000000


class TestKeepMask:
    def test_known_values(self):
        """Pinned: a stored seed must drop the same elements in every version."""
        mask = keep_mask(0, "math", "model.layers.0.mlp.down_proj.weight", 0, 64, 0.5)
        assert sum(1 << i for i, kept in enumerate(mask.tolist()) if kept) == 0x18E0B086666603A6
        mask = keep_mask(1234, "código", "w", 2**32 - 32, 64, 0.7)
        assert sum(1 << i for i, kept in enumerate(mask.tolist()) if kept) == 0x6BD66736FFFA6FB8

    @pytest.mark.parametrize("start", [0, 5, 2**31 - 50, 2**32 - 50, 3 * 2**32 + 7, 2**40])
    def test_matches_python_integers(self, start):
        mask = keep_mask(3, "expert", "tensor", start, 100, 0.3)
        limit = int(0.3 * 2**32)
        for place in range(100):
            page, index = divmod(start + place, 2**32)
            keys = keep_masks._mask_keys(3, "expert", "tensor", page)
            assert mask[place].item() == (python_hash(index, *keys) < limit)

    @pytest.mark.parametrize("start", [0, 2**32 - 70_000], ids=["start", "page_end"])
    def test_chunks_do_not_matter(self, start, monkeypatch):
        whole = keep_mask(0, "a", "t", start, 150_000, 0.7)
        for step in (1_001, 65_536, 100_000):
            parts = [
                keep_mask(0, "a", "t", start + place, min(step, 150_000 - place), 0.7)
                for place in range(0, 150_000, step)
            ]
            assert torch.equal(torch.cat(parts), whole)
        monkeypatch.setattr(keep_masks, "BLOCK_ELEMENTS", 777)
        assert torch.equal(keep_mask(0, "a", "t", start, 150_000, 0.7), whole)

    @pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.7, 0.999])
    @pytest.mark.parametrize("expert", ["a", "b", "math", "中文"])
    def test_density(self, expert, density):
        """Counts are within 5 standard deviations of a binomial (one seed in 1.7 million is not)."""
        count = 1 << 20
        kept = int(keep_mask(0, expert, "w", 0, count, density).sum())
        assert abs(kept - density * count) <= 5 * math.sqrt(count * density * (1 - density))

    def test_no_element_depends_on_its_neighbours(self):
        """Agreement of the mask with itself shifted is binomial, for neighbours and for typical row widths."""
        count = 1 << 20
        mask = keep_mask(1, "a", "w", 0, count, 0.5)
        for shift in (1, 2, 3, 64, 1024, 4096, 65536):
            pairs = count - shift
            agree = int((mask[shift:] == mask[:-shift]).sum())
            assert abs(agree - pairs / 2) <= 5 * math.sqrt(pairs) / 2, shift

    @pytest.mark.parametrize(
        "other",
        [
            (1, "a", "w", 0),
            (2**40, "a", "w", 0),
            (0, "b", "w", 0),
            (0, "a", "v", 0),
            (0, "aw", "", 0),
            (0, "a", "w", 2**32),
            (0, "a", "w", 1),
        ],
        ids=["seed", "large_seed", "expert", "tensor", "joined_names", "next_page", "next_element"],
    )
    def test_different_streams_are_independent(self, other):
        """Agreement of two masks is binomial."""
        count = 1 << 20
        seed, expert, tensor, start = other
        agree = int(
            (keep_mask(0, "a", "w", 0, count, 0.5) == keep_mask(seed, expert, tensor, start, count, 0.5)).sum()
        )
        assert abs(agree - count / 2) <= 5 * math.sqrt(count) / 2

    def test_no_stream_is_a_shift_of_another(self):
        """No window of another expert's mask appears in the first million elements of this one."""
        ours = keep_mask(0, "a", "w", 0, 1 << 20, 0.5)
        theirs = keep_mask(0, "b", "w", 0, 64, 0.5)
        windows = torch.zeros(len(ours) - 63, dtype=torch.int64)
        pattern = 0
        for place in range(63):
            windows |= ours[place : place + len(windows)].long() << place
            pattern |= int(theirs[place]) << place
        assert not (windows == pattern).any()

    def test_a_larger_density_keeps_more_of_the_same(self):
        masks = [keep_mask(0, "a", "w", 0, 10_000, density) for density in (0, 0.2, 0.7, 0.99, 1)]
        assert not masks[0].any() and masks[-1].all()
        assert all((fewer <= more).all() for fewer, more in zip(masks, masks[1:], strict=False))

    def test_threads_do_not_matter(self):
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = keep_mask(0, "a", "w", 3, 300_000, 0.7)
            torch.set_num_threads(3)
            together = keep_mask(0, "a", "w", 3, 300_000, 0.7)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(alone, together)

    def test_empty(self):
        assert keep_mask(0, "a", "w", 10, 0, 0.7).shape == (0,)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="density is 1.1, expected 0 to 1"):
            keep_mask(0, "a", "w", 0, 5, 1.1)
        with pytest.raises(ValueError, match="not a range"):
            keep_mask(0, "a", "w", -1, 5, 0.5)
