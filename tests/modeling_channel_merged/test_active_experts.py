"""Which experts a batch uses is seen by the code below, and by nothing else."""

import threading

import pytest
import torch

from modeling_channel_merged.active_experts import ActiveExperts, activate, active_experts, active_or_none


def test_uniform_batch_becomes_one_expert():
    active = ActiveExperts.from_index(torch.tensor([2, 2, 2]))
    assert active.expert == 2 and active.expert_index is None


def test_mixed_batch_is_ordered_by_expert():
    index = torch.tensor([3, 0, 3, 1, 0])
    active = ActiveExperts.from_index(index)
    assert active.expert is None
    assert index[active.order].tolist() == [0, 0, 1, 3, 3]
    assert active.order.sort().values.tolist() == list(range(len(index)))
    assert active.counts == ((0, 2), (1, 1), (3, 2))


def test_outside_of_a_model_is_an_error():
    with pytest.raises(RuntimeError, match="outside of its model"):
        active_experts()


def test_nesting_restores_the_outer_experts_even_after_an_error():
    outer, inner = ActiveExperts(0), ActiveExperts(1)
    with activate(outer):
        with pytest.raises(KeyError), activate(inner):
            assert active_experts() is inner
            raise KeyError
        assert active_experts() is outer
    assert active_or_none() is None


def test_threads_do_not_see_each_other():
    seen, barrier = {}, threading.Barrier(2)

    def work(expert):
        with activate(ActiveExperts(expert)):
            barrier.wait()
            seen[expert] = active_experts().expert
            barrier.wait()

    threads = [threading.Thread(target=work, args=(expert,)) for expert in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: 0, 1: 1}
