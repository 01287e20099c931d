import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.channels import magnitude_threshold
from conversion.channels.magnitude_threshold import MagnitudeThreshold


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
