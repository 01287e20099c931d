"""Every expert's own end of sequence: in a mixed batch each row stops at the tokens that end its expert's answers.

Shapes: N experts, E end-of-sequence tokens, B queries, S sequences (those of one query follow each other), T tokens.
"""

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria


class ExpertEosCriteria(EosTokenCriteria):
    """Stops a sequence at an end-of-sequence token of its own expert.

    Args:
        eos_token_ids: the tokens of each expert, N lists.
        expert_index: (B,) int64 expert of each query.
    """

    def __init__(self, eos_token_ids: list[list[int]], expert_index: torch.LongTensor):
        super().__init__(sorted({token for tokens in eos_token_ids for token in tokens}))
        longest = max(len(tokens) for tokens in eos_token_ids)
        padded = [[*tokens, *[-1] * (longest - len(tokens))] for tokens in eos_token_ids]  # no token is -1
        self.row_tokens = torch.tensor(padded, device=expert_index.device)[expert_index]  # (B, E)

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.Tensor | None, new_token_length: int = 1, **kwargs
    ) -> torch.BoolTensor:
        """Whether each sequence of (S, T) ids ends in its newest tokens: (S,)."""
        tokens = self.row_tokens.to(input_ids.device)
        tokens = tokens.repeat_interleave(input_ids.shape[0] // tokens.shape[0], dim=0)
        return (input_ids[:, -new_token_length:, None] == tokens[:, None]).any(dim=(1, 2))
