"""Rows with a low-rank product are the same bits in every chunk and with any threads, and as exact as float32."""

import pytest
import torch

from conversion.channels.low_rank import add_low_rank


@pytest.mark.parametrize("inputs", [24, 2001])
@pytest.mark.parametrize("rank", [1, 16, 63])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_blocks_do_not_depend_on_what_follows_nor_on_threads(rank, dora, inputs):
    """Sizes at which a matrix product takes other kernels for few rows than for many, and for several threads."""
    generator = torch.Generator().manual_seed(0)
    rows, up = torch.randn(77, inputs, generator=generator), torch.randn(77, rank, generator=generator)
    down = torch.randn(rank, inputs, generator=generator)
    magnitude = torch.rand(77, generator=generator) if dora else None
    whole = add_low_rank(rows, up, down, 0.7, magnitude=magnitude)
    for start, stop in ((0, 16), (16, 77), (64, 77), (32, 64)):
        part = slice(start, stop)
        norms = magnitude[part] if dora else None
        assert torch.equal(add_low_rank(rows[part].clone(), up[part].clone(), down, 0.7, magnitude=norms), whole[part])
    threads = torch.get_num_threads()
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        assert torch.equal(add_low_rank(rows, up, down, 0.7, magnitude=magnitude), whole)
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    exact = rows.double() + 0.7 * (up.double() @ down.double())
    if dora:
        exact *= (magnitude.double() / exact.norm(dim=1))[:, None]
    terms = rows.double().abs() + 0.7 * (up.double().abs() @ down.double().abs())
    bound = (rank + 3) * torch.finfo(torch.float32).eps * (terms if not dora else terms.max() / terms.mean())
    assert ((whole.double() - exact).abs() <= bound).all()
