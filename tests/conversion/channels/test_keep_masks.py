import math

import pytest
import torch

from conversion.channels import keep_masks
from conversion.channels.keep_masks import keep_mask

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
