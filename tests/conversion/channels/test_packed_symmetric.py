import pytest
import torch

from conversion.channels.packed_symmetric import BLOCK_ROWS, pack_symmetric, packed_size, unpack_symmetric


@pytest.mark.parametrize("size", [1, 7, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 63])
def test_a_matrix_comes_back(size):
    """Bit for bit, with little more than half of its values stored."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator)
    matrix = matrix + matrix.T
    packed = pack_symmetric(matrix, torch.float32)
    assert packed.shape == (packed_size(size),) and len(packed) <= size * (size + BLOCK_ROWS) / 2 + BLOCK_ROWS**2
    assert torch.equal(unpack_symmetric(packed, torch.empty(size, size)), matrix)
    assert torch.equal(pack_symmetric(matrix.double(), torch.float32), packed)
