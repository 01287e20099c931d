"""A sequence ends where its own expert's answers end."""

import torch

from modeling_channel_merged.expert_stopping import ExpertEosCriteria


def test_each_sequence_has_its_experts_tokens():
    """Sequences of one query follow each other; an expert may have several ends, or none."""
    criteria = ExpertEosCriteria([[2], [], [7, 8]], torch.tensor([2, 0, 1]))
    ends = torch.tensor([[7], [2], [2], [8], [2], [7]])
    assert criteria(ends, None).tolist() == [True, False, True, False, False, False]
    assert criteria(torch.tensor([[8], [2], [7]]), None).tolist() == [True, True, False]
    assert criteria.eos_token_id.tolist() == [2, 7, 8]


def test_only_the_newest_tokens_count():
    criteria = ExpertEosCriteria([[2], [3]], torch.tensor([0, 1]))
    input_ids = torch.tensor([[2, 5, 5], [9, 3, 5]])
    assert criteria(input_ids, None).tolist() == [False, False]
    assert criteria(input_ids, None, new_token_length=2).tolist() == [False, True]
