"""The router: which expert should answer a query, from the trunk expert's features of it."""

import torch
import torch.nn.functional as F
from torch import nn


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per query: the mean over its tokens, or its last token; padding on either side changes nothing.

    Args:
        hidden_states: (B, T, H).
        attention_mask: (B, T), 1 for tokens and 0 for padding; a query without tokens gives zeros.
        pooling: "mean" or "last".

    Returns:
        (B, H) float32.
    """
    mask = attention_mask.to(torch.float32)
    if pooling == "last":
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        mask = F.one_hot((mask * positions).argmax(-1), mask.shape[1]) * mask
    # Masked tokens may hold anything, so they are replaced and not multiplied by zero.
    tokens = hidden_states.float().masked_fill(mask[..., None] == 0, 0.0)
    return tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class ExpertRouter(nn.Module):
    """Pooled features, normalised, through one linear head in float32; starts at zero, which means untrained."""

    def __init__(self, hidden_size: int, num_experts: int, pooling: str):
        super().__init__()
        self.pooling = pooling
        self.head = nn.Linear(hidden_size, num_experts, dtype=torch.float32)
        # The model's `_init_weights` says the same: loading on the meta device skips this one.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def is_trained(self) -> bool:
        """Whether the head has left its zero start. Synchronises with the device."""
        return bool(self.head.weight.detach().any())

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T, H) hidden states and (B, T) attention mask -> (B, N) float32 logits."""
        features = pool(hidden_states, attention_mask, self.pooling)
        return self.head(F.layer_norm(features, features.shape[-1:]))
