"""Draws by noise: the right distribution, the same for a seed, none where a request is greedy."""

import torch
from transformers import GenerationConfig

from conversion.serving.sampling import GumbelNoise, gumbel_noise, noise_key, sampling_arguments


def test_draws_have_the_distribution_of_the_softmax():
    """Within five standard deviations for each of 40 tokens, over seeds and positions."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, generator=generator)
    keys = torch.tensor([noise_key(seed, position) for seed in range(100) for position in range(200)]).int()
    draws = (logits + gumbel_noise(keys, 40)).argmax(-1)
    share, expected = torch.bincount(draws, minlength=40) / len(keys), logits.softmax(-1)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / len(keys)).sqrt()).all()


def test_noise_of_different_seeds_positions_and_tokens_is_unrelated():
    keys = torch.tensor([noise_key(seed, position) for seed in range(20) for position in range(20)]).int()
    noise = gumbel_noise(keys, 300)
    assert noise.isfinite().all()
    for matrix in (noise, noise.T):
        related = torch.corrcoef(matrix).fill_diagonal_(0).abs().max()
        assert related < 6 / matrix.shape[1] ** 0.5, related


def test_a_row_of_noise_depends_on_its_key_alone():
    keys = torch.tensor([noise_key(3, 7), noise_key(4, 7), noise_key(3, 8)]).int()
    assert torch.equal(gumbel_noise(keys, 50)[1:2], gumbel_noise(keys[1:2], 50))
    assert torch.equal(gumbel_noise(keys, 50)[:, :20], gumbel_noise(keys, 20))


def test_greedy_rows_are_left_as_they_are():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    arguments = torch.tensor([0, noise_key(1, 1), 0, 5, 5], dtype=torch.int32)  # of a longer buffer
    noisy = GumbelNoise()(scores, arguments)
    assert torch.equal(noisy[[0, 2]], scores[[0, 2]])
    assert torch.equal(noisy[1], scores[1] + gumbel_noise(arguments[1:2], 50)[0])
    assert torch.equal(GumbelNoise()(scores, torch.zeros(3, dtype=torch.int32)), scores)


def test_what_a_request_says_of_its_sampling():
    assert sampling_arguments(GenerationConfig(do_sample=False, temperature=0.5), 3) == {}
    config = GenerationConfig(do_sample=True, temperature=1e-30, top_p=0.5, top_k=4)
    assert sampling_arguments(config, 3) == {"seed": 3, "temperature": 1e-5, "top_p": 0.5, "top_k": 4}
    assert sampling_arguments(GenerationConfig(do_sample=True), 3) == {"seed": 3, "temperature": 1.0}
