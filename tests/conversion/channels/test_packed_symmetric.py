import pytest
import torch

from conversion.channels.packed_symmetric import BLOCK_ROWS, SquareSum, packed_size, unpack_symmetric


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 63])
def test_the_mean_of_squares(size, dtype):
    """Against float64, within float32's rounding; symmetric; with little more than half of the values stored."""
    generator, total = torch.Generator().manual_seed(size), SquareSum(size)
    parts = [torch.randn(count, size, generator=generator).to(dtype) for count in (1, 40, 300)]
    for part in parts:
        total.add(part)
    packed = total.packed_mean(341)
    assert packed.shape == (packed_size(size),) and packed.dtype == torch.float32
    assert len(packed) <= size * (size + BLOCK_ROWS) / 2 + BLOCK_ROWS**2
    matrix = unpack_symmetric(packed, torch.empty(size, size))
    inputs = torch.cat(parts).double()
    expected = inputs.T @ inputs / 341
    bound = 300 * 2**-24 * expected.diagonal().max().item()  # of a float32 sum of 300 products
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=bound)
    assert torch.equal(matrix, matrix.T)


def test_small_terms_are_not_lost_in_large_sums():
    """As float32 would after 2^24 of them."""
    total = SquareSum(1)
    total.add(torch.full((1, 1), 2.0**13))
    for _ in range(64):
        total.add(torch.ones(1, 1))
    assert total.packed_mean(1).item() == 2**26 + 64
