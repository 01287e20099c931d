"""A block of rows of all experts, read at once."""

import torch

from conversion.merging.block_reader import fill_missing_rows


def test_missing_rows_are_those_of_another_expert():
    experts = [torch.full((3, 2), float(number)) for number in range(3)]
    present = torch.tensor([[False, False, True], [True, False, False], [True, False, True]])
    fill_missing_rows(experts, torch.full((3, 2), 9.0), present)
    assert [rows[:, 0].tolist() for rows in experts] == [[1, 9, 0], [1, 9, 0], [2, 9, 2]]
