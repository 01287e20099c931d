import pytest
import torch
import torch.nn.functional as F

from conversion.refinement.divergence import TopTokens, divergence, top_tokens

P, V = 7, 29


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(P, V, generator=torch.Generator().manual_seed(seed))


def whole_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("k", [V, V + 10])
def test_all_tokens_give_the_whole_divergence(k):
    """Values and gradients; a larger k keeps what there is."""
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    kept = top_tokens(teacher, k)
    assert kept.values.shape == (P, V) and kept.rest.isneginf().all()
    expected = whole_divergence(student, teacher)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    result = divergence(student, kept)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), student)[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_the_rest_is_one_outcome(k):
    """The same as the divergence of two distributions over k + 1 outcomes, and never more than the whole one."""
    teacher, student = random_logits(2), random_logits(3)
    kept = top_tokens(teacher, k)
    for position in range(P):
        order = teacher[position].sort(descending=True).indices
        outcomes = [[token] for token in order[:k].tolist()] + [order[k:].tolist()]
        p, q = (
            torch.stack([logits[position].double().softmax(-1)[tokens].sum() for tokens in outcomes])
            for logits in (teacher, student)
        )
        expected = float((p * (p / q).log()).sum())
        assert float(divergence(student, kept)[position]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (divergence(student, kept) <= whole_divergence(student, teacher) * (1 + 1e-5)).all()  # rounding
    torch.testing.assert_close(divergence(teacher, kept), torch.zeros(P), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [3, V - 5, V])
def test_tokens_that_neither_has_add_nothing(k):
    """-inf in both, as for a token that the expert does not have; the gradient stays finite."""
    missing = torch.arange(V) >= V - 5
    teacher = random_logits(4).masked_fill(missing, float("-inf"))
    logits = random_logits(5).requires_grad_()
    result = divergence(logits.masked_fill(missing, float("-inf")), top_tokens(teacher, k))
    expected = divergence(logits[:, : V - 5], top_tokens(teacher[:, : V - 5], k))
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[:, : V - 5].any() and not logits.grad[:, V - 5 :].any()


def test_distributions_that_leave_no_rest():
    """A teacher so sure that the rest's probability is lost in rounding: a student that is not has a finite loss."""
    teacher = torch.zeros(1, V)
    teacher[0, 4] = 200.0
    kept = top_tokens(teacher, 2)
    assert isinstance(kept, TopTokens)
    student = random_logits(6)[:1].requires_grad_()
    loss = divergence(student, kept)
    torch.testing.assert_close(loss, -student.log_softmax(-1)[:, 4])
    loss.sum().backward()
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    teacher, student = random_logits(7).bfloat16(), random_logits(8).bfloat16()
    kept = top_tokens(teacher, 5)
    assert kept.values.dtype == kept.rest.dtype == torch.float32
    assert torch.equal(divergence(student, kept), divergence(student.float(), kept))
