"""Under autocast a channel-merged model computes as the dense model of each of its experts does."""

import pytest
import torch

from .conftest import dense_expert, random_model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", [7, 35], ids=["few", "many"])
@pytest.mark.parametrize("experts", [[1, 1, 1], [2, 0, 1]], ids=["one", "mixed"])
def test_autocast_is_the_dense_models(text_config, grad, length, experts):
    """The same dtype, and at most twice the dense model's own error; routing stays in float32."""
    model = random_model(text_config, 3)
    prompts = torch.randint(3, 99, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(prompts, expert_index=experts).logits
        routing = model.route(prompts)
        for row, expert in enumerate(experts):
            dense = dense_expert(model, expert)
            expected = dense(prompts[row : row + 1]).logits
            with torch.autocast("cpu", enabled=False):
                exact = dense.double()(prompts[row : row + 1]).logits
            assert logits.dtype == expected.dtype == torch.bfloat16
            assert (logits[row : row + 1] - exact).norm() <= 2 * (expected - exact).norm()
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, model.route(prompts).logits, rtol=0.02, atol=0.5)
