"""The router: which expert should answer a query, from the trunk expert's features of it and from its tokens.

The features of the first blocks say what a query is about where the trunk is large enough to know. The n-grams of its
token ids, hashed into buckets with one weight for each expert, need no trunk: they are what decides with a small one.
Both are of unit norm, so neither drowns the other.

Shapes: B queries, T tokens, H hidden size, N experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

NGRAM_BUCKETS = 1 << 15
NO_BUCKET = NGRAM_BUCKETS  # sorts behind all buckets
BYTE_BITS = 8  # of a bucket's number in one column of features: 16-bit floats hold integers up to 256 exactly
MERSENNE_PRIME = (1 << 31) - 1


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


def ngram_buckets(input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.LongTensor:
    """The buckets of a query's tokens and pairs of neighbouring tokens, each bucket once; padding changes nothing.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side.

    Returns:
        (B, 2T) int64: buckets in rising order, from 0 to NGRAM_BUCKETS - 1, and then NO_BUCKET.
    """
    tokens = attention_mask.bool()
    first, second = input_ids[:, :-1], input_ids[:, 1:]
    buckets = torch.cat([_hash(input_ids), _hash(first, second + 1)], dim=1)
    buckets = buckets.masked_fill(~torch.cat([tokens, tokens[:, :-1] & tokens[:, 1:]], dim=1), NO_BUCKET)
    buckets = F.pad(buckets, (0, 2 * input_ids.shape[1] - buckets.shape[1]), value=NO_BUCKET).sort(-1).values
    repeated = F.pad(buckets[:, 1:] == buckets[:, :-1], (1, 0))
    return buckets.masked_fill(repeated, NO_BUCKET).sort(-1).values


def _hash(first: torch.LongTensor, second: torch.LongTensor | int = 0) -> torch.LongTensor:
    """Buckets of token ids or of pairs of them; no product leaves int64 for ids below 2^31."""
    mixed = (first * 1_000_003 + second * 998_244_353) % MERSENNE_PRIME
    return mixed * 48_271 % MERSENNE_PRIME % NGRAM_BUCKETS


def keep_router_in_memory(device_map: dict[str, str | int | torch.device]):
    """Change a device map that offloads: the router, small and asked before every answer, stays on the main device.

    Its table of n-grams may be missing from a checkpoint, and what is missing cannot be read anew for each use.
    """
    devices = [str(device) for device in device_map.values()]
    if "disk" not in devices and len({*devices}) < 2:
        return
    main = next((device for device in device_map.values() if str(device) not in ("cpu", "disk")), "cpu")
    if "" in device_map:
        device_map.setdefault("model", device_map.pop(""))
    for name in [name for name in device_map if name.startswith("router.")]:
        del device_map[name]
    device_map["router"] = main


class RouterHead(nn.Module):
    """A linear map (H -> N) in float32. No nn.Linear, so that no quantizer takes it for one of the model's."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, H) -> (B, N)."""
        return F.linear(features, self.weight, self.bias)


class ExpertRouter(nn.Module):
    """A linear map of trunk features and n-grams to expert logits, in float32; starts at zero, which means untrained.

    The weights stay in float32 where the model is cast, as by `model.half()` or `model.to(dtype)`.

    Args:
        features: "trunk_and_ngrams", or "trunk" for pooled and normalised trunk features alone.
        max_tokens: longest query in tokens.
    """

    def __init__(self, hidden_size: int, num_experts: int, pooling: str, features: str, max_tokens: int):
        super().__init__()
        self.pooling = pooling
        self.hidden_size = hidden_size
        self.max_ngrams = 2 * max_tokens
        self.head = RouterHead(hidden_size, num_experts)
        self.ngrams = None
        if features == "trunk_and_ngrams":
            self.ngrams = nn.Embedding(NGRAM_BUCKETS, num_experts, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self):
        """Back to the untrained start."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def is_trained(self) -> bool:
        """Whether the weights have left their zero start. Synchronises with the device."""
        if self.head.weight.is_meta:
            return self._offloaded_is_trained()
        weights = [self.head.weight] if self.ngrams is None else [self.head.weight, self.ngrams.weight]
        return any(bool(weight.detach().any()) for weight in weights)

    @torch.no_grad()
    def _offloaded_is_trained(self) -> bool:
        """The same of weights that are there only while their module runs: read from its outputs."""
        if self.ngrams is not None and self.ngrams(torch.arange(NGRAM_BUCKETS)).any():
            return True
        columns = self.head(torch.eye(self.hidden_size)) - self.head(torch.zeros(self.hidden_size))
        return bool(columns.any())

    def features(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, input_ids: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """What the router reads of a query, in one tensor that training may keep.

        Args:
            hidden_states: (B, T, H), T at most `max_tokens`.
            attention_mask: (B, T).
            input_ids: (B, T); None where only embeddings are known, and then the trunk features alone decide.

        Returns:
            (B, H) float32 trunk features; where n-grams are read, followed by twice 2 * max_tokens columns: the high
            and then the low bytes of their buckets, which a cast to 16 bits leaves as they are.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            pooled = pool(hidden_states, attention_mask, self.pooling)
            trunk = F.layer_norm(pooled, pooled.shape[-1:])
            if self.ngrams is None:
                return trunk
            trunk = trunk / self.hidden_size**0.5
            if input_ids is None:
                buckets = attention_mask.new_empty((len(trunk), 0), dtype=torch.int64)
            else:
                buckets = ngram_buckets(input_ids, attention_mask)
            buckets = F.pad(buckets, (0, self.max_ngrams - buckets.shape[1]), value=NO_BUCKET)
            high, low = buckets >> BYTE_BITS, buckets & ((1 << BYTE_BITS) - 1)
            return torch.cat([trunk, high.float(), low.float()], dim=-1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) features -> (B, N) float32 logits."""
        with torch.autocast(features.device.type, enabled=False):  # a bf16 Trainer would round the logits
            # Mixed precision of FSDP casts weights and inputs all the same.
            logits = self.head(features[:, : self.hidden_size].to(self.head.weight.dtype)).float()
            if self.ngrams is None:
                return logits
            high, low = features[:, self.hidden_size :].long().chunk(2, dim=-1)
            buckets = (high << BYTE_BITS) + low
            present = (buckets != NO_BUCKET).float()
            weights = present / present.sum(-1, keepdim=True).clamp(min=1).sqrt()
            return logits + (self.ngrams(buckets * present.long()).float() * weights[..., None]).sum(1)
