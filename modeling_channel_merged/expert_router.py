"""The router: which expert should answer a query, from the trunk expert's features of it and from its tokens.

The n-grams of a query's token ids, hashed into buckets with one weight for each expert, need no trunk. Its logits are
the sum of its buckets' weights over the square root of their number. The forms, by `features`:

- "words": n-grams of plain tokens, which are token ids without case and white space, and whole words. No block runs.
- "trunk_and_words": the same, and the features of the first blocks, linearly; both of unit norm.
- "trunk_and_ngrams": the same with n-grams of token ids as they are.
- "trunk": the features of the first blocks alone.

Shapes: B queries, T tokens, H hidden size, N experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_channel_merged import NGRAM_BUCKETS, ChannelMergedConfig

WORD = -1  # in the place of a pair's second token
BYTE_BITS = 8  # of a bucket's number in one column of features: 16-bit floats hold integers up to 256 exactly
BYTE = (1 << BYTE_BITS) - 1
BUCKET_BYTES = 3  # for MAX_BUCKETS of them
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


def ngram_buckets(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor, num_buckets: int = NGRAM_BUCKETS
) -> torch.LongTensor:
    """The buckets of a query's tokens and pairs of neighbouring tokens, each bucket once; padding changes nothing.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side.
        num_buckets: which also stands where there is no bucket.

    Returns:
        (B, 2T) int64: buckets in rising order, from 0 to num_buckets - 1, and then num_buckets.
    """
    return _each_once(_tokens_and_pairs(input_ids, attention_mask, num_buckets), num_buckets)


def word_buckets(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor, plain_tokens: torch.LongTensor, num_buckets: int
) -> torch.LongTensor:
    """As `ngram_buckets`, of plain tokens, of pairs of them and of whole words.

    Args:
        plain_tokens: (V,) what each token id is without case and white space, a number from 1; negative where it
            begins a word. An id beyond them is a word of its own.

    Returns:
        (B, 3T) int64.
    """
    if not input_ids.shape[1]:
        return input_ids
    tokens = attention_mask.bool()
    known = input_ids < len(plain_tokens)
    plain = torch.where(known, plain_tokens[input_ids.where(known, 0)], -input_ids - 1)
    begins, plain = (plain < 0) | ~tokens | ~F.pad(tokens[:, :-1], (1, 0)), plain.abs()
    number = begins.long().cumsum(-1) - 1  # of each token's word; the first token begins one
    column = torch.arange(plain.shape[1], device=plain.device).expand_as(plain)
    place = column - column.where(begins, 0).cummax(-1).values
    # A word is the sum of its tokens, each times a number of its place in the word: below T times 2^31.
    words = torch.zeros_like(plain).scatter_add(1, number, plain * _mix(place, 1) % MERSENNE_PRIME)
    is_word = torch.zeros_like(tokens).scatter(1, number, tokens)  # padding is a word for itself
    words = _hash(words % MERSENNE_PRIME, WORD, num_buckets).masked_fill(~is_word, num_buckets)
    return _each_once(torch.cat([_tokens_and_pairs(plain, attention_mask, num_buckets), words], dim=1), num_buckets)


def _tokens_and_pairs(input_ids: torch.LongTensor, attention_mask: torch.Tensor, num_buckets: int) -> torch.LongTensor:
    """(B, 2T) buckets of tokens and of pairs of neighbours, in no order; num_buckets where there is none."""
    tokens = attention_mask.bool()
    first, second = input_ids[:, :-1], input_ids[:, 1:]
    buckets = torch.cat([_hash(input_ids, 0, num_buckets), _hash(first, second + 1, num_buckets)], dim=1)
    buckets = buckets.masked_fill(~torch.cat([tokens, tokens[:, :-1] & tokens[:, 1:]], dim=1), num_buckets)
    return F.pad(buckets, (0, 2 * input_ids.shape[1] - buckets.shape[1]), value=num_buckets)


def _each_once(buckets: torch.LongTensor, num_buckets: int) -> torch.LongTensor:
    buckets = buckets.sort(-1).values
    repeated = F.pad(buckets[:, 1:] == buckets[:, :-1], (1, 0))
    return buckets.masked_fill(repeated, num_buckets).sort(-1).values


def _mix(first: torch.LongTensor, second: torch.LongTensor | int) -> torch.LongTensor:
    """Pairs of numbers below 2^31 as one number; no product leaves int64."""
    mixed = (first * 1_000_003 + second * 998_244_353) % MERSENNE_PRIME
    return mixed * 48_271 % MERSENNE_PRIME


def _hash(first: torch.LongTensor, second: torch.LongTensor | int, num_buckets: int) -> torch.LongTensor:
    return _mix(first, second) % num_buckets


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
    """A linear map of what a query has to expert logits, in float32; starts at zero, which means untrained.

    The weights stay in float32 where the model is cast, as by `model.half()` or `model.to(dtype)`.

    Args:
        features: "words", "trunk_and_words", "trunk_and_ngrams" or "trunk".
        max_tokens: longest query in tokens.
        ngram_buckets: rows of the table of n-grams.
        vocabulary: ids that `plain_tokens` knows, for words.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        pooling: str,
        features: str,
        max_tokens: int,
        ngram_buckets: int = NGRAM_BUCKETS,
        vocabulary: int = 0,
    ):
        super().__init__()
        self.pooling = pooling
        self.hidden_size = hidden_size
        self.num_buckets = ngram_buckets
        self.reads_trunk = features != "words"
        self.reads_words = features in ("words", "trunk_and_words")
        self.max_ngrams = (3 if self.reads_words else 2) * max_tokens
        self.head = RouterHead(hidden_size, num_experts)
        self.ngrams = None
        if features != "trunk":
            self.ngrams = nn.Embedding(ngram_buckets, num_experts, dtype=torch.float32)
        if self.reads_words:
            self.register_buffer("plain_tokens", torch.zeros(vocabulary, dtype=torch.int32))
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
        if self.ngrams is not None and self.ngrams(torch.arange(self.num_buckets)).any():
            return True
        columns = self.head(torch.eye(self.hidden_size)) - self.head(torch.zeros(self.hidden_size))
        return bool(columns.any())

    def features(
        self,
        hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """What the router reads of a query, in one tensor that training may keep.

        Args:
            hidden_states: (B, T, H), T at most `max_tokens`; None where it reads no trunk, and then its columns are 0.
            attention_mask: (B, T).
            input_ids: (B, T); None where only embeddings are known, and then there are no n-grams.

        Returns:
            (B, H) float32 trunk features; where n-grams are read, followed by BUCKET_BYTES times `max_ngrams` columns:
            the high, middle and low bytes of their buckets, which a cast to 16 bits leaves as they are.
        """
        with torch.autocast(attention_mask.device.type, enabled=False):
            if hidden_states is None:
                trunk = torch.zeros(len(attention_mask), self.hidden_size, device=attention_mask.device)
            else:
                pooled = pool(hidden_states, attention_mask, self.pooling)
                trunk = F.layer_norm(pooled, pooled.shape[-1:])
            if self.ngrams is None:
                return trunk
            trunk = trunk / self.hidden_size**0.5
            buckets = self.buckets(input_ids, attention_mask)
            columns = [buckets >> BYTE_BITS * place & BYTE for place in reversed(range(BUCKET_BYTES))]
            return torch.cat([trunk, *(column.float() for column in columns)], dim=-1)

    def buckets(self, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor) -> torch.LongTensor:
        """(B, max_ngrams) int64 buckets of a query's n-grams in rising order, and then `num_buckets`."""
        if input_ids is None:
            buckets = attention_mask.new_empty((len(attention_mask), 0), dtype=torch.int64)
        elif self.reads_words:
            buckets = word_buckets(input_ids, attention_mask, self.plain_tokens.long(), self.num_buckets)
        else:
            buckets = ngram_buckets(input_ids, attention_mask, self.num_buckets)
        return F.pad(buckets, (0, self.max_ngrams - buckets.shape[1]), value=self.num_buckets)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) features -> (B, N) float32 logits."""
        with torch.autocast(features.device.type, enabled=False):  # a bf16 Trainer would round the logits
            # Mixed precision of FSDP casts weights and inputs all the same.
            logits = self.head(features[:, : self.hidden_size].to(self.head.weight.dtype)).float()
            if self.ngrams is None:
                return logits
            buckets, present = self._stored_buckets(features)
            weights = present / present.sum(-1, keepdim=True).clamp(min=1).sqrt()
            return logits + (self.ngrams(buckets * present.long()).float() * weights[..., None]).sum(1)

    def _stored_buckets(self, features: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """(B, F) features -> (B, max_ngrams) buckets, and 1.0 for each that is one."""
        columns = features[:, self.hidden_size :].long().chunk(BUCKET_BYTES, dim=-1)
        buckets = sum(column << BYTE_BITS * place for place, column in enumerate(reversed(columns)))
        return buckets, (buckets != self.num_buckets).float()

    def known_share(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) features -> (B,) float32: of how many of a query's n-grams training has seen their buckets.

        1 where there is no table to ask, or no n-gram.
        """
        if self.ngrams is None:
            return torch.ones(len(features), device=features.device)
        buckets, present = self._stored_buckets(features)
        known = self.ngrams(buckets * present.long()).ne(0).any(-1) * present
        count = present.sum(-1)
        return torch.where(count > 0, known.sum(-1) / count.clamp(min=1), 1.0)


def make_router(config: ChannelMergedConfig) -> ExpertRouter:
    """The untrained router that a config describes."""
    keys = ("pooling", "features", "max_tokens", "ngram_buckets", "vocabulary")
    settings = {key: config.router[key] for key in keys}
    return ExpertRouter(config.hidden_size, config.num_experts, **settings)
