"""How each request of a packed batch draws its tokens: temperature, top-k, top-p and seed of its own, or greedily.

Continuous batching takes the highest score for all requests of a batch, or draws for all. Here it always takes the
highest, of scores to which Gumbel noise is added where a request samples: the argmax of logits / T + noise is a draw
from softmax(logits / T), and without noise it is the greedy token, exactly. The noise is a hash of the request's seed,
the token's position and its number, so that a seed gives the same noise whatever else runs in the batch.

S: sampled rows, V: vocabulary size.
"""

import hashlib
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

MIN_TEMPERATURE = 1e-5  # so near to greedy that nobody can tell, so far from 0 that scores stay finite


def request_processors(
    common: ContinuousBatchingLogitsProcessorList, vocab_size: int
) -> ContinuousBatchingLogitsProcessorList:
    """The processors that all requests have in `common`, and those by which each request samples in its own way."""
    own = [
        _Temperature(TemperatureLogitsWarper(1.0)),
        _TopK(TopKLogitsWarper(vocab_size)),
        _TopP(TopPLogitsWarper(1.0)),
        GumbelNoise(),
    ]
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([*common.logits_processor, *own]))
    processors.tensors_required = common.tensors_required + len(own)
    return processors


def sampling_arguments(config: GenerationConfig, seed: int) -> dict[str, Any]:
    """What a request says to `request_processors`: nothing if it is greedy."""
    if not config.do_sample:
        return {}
    temperature = 1.0 if config.temperature is None else config.temperature
    arguments = {"temperature": float(max(temperature, MIN_TEMPERATURE)), "seed": seed}
    if config.top_p is not None:
        arguments["top_p"] = float(config.top_p)
    if config.top_k:  # 0: all tokens, where continuous batching takes it for 1
        arguments["top_k"] = config.top_k
    return arguments


class _OnlyWhereAsked:
    """On the CPU, where it costs nothing to look, a processor that no request of the batch asked for is not run.

    On other devices that would wait for the device, and a captured graph has all processors.
    """

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        asked = tensor_arg[: len(scores)]
        if scores.device.type == "cpu":
            neutral = torch.empty_like(asked)
            self.fill_defaults(neutral)
            if torch.equal(asked, neutral):
                return scores
        return super().__call__(scores, tensor_arg)


class _Temperature(_OnlyWhereAsked, ContinuousBatchingTemperatureLogitsWarper):
    pass


class _TopK(_OnlyWhereAsked, ContinuousBatchingTopKLogitsWarper):
    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        return super().prepare_tensor_args(requests_with_new_token).clamp(max=self.top_k)  # the vocabulary's size


class _TopP(_OnlyWhereAsked, ContinuousBatchingTopPLogitsWarper):
    pass


class GumbelNoise(ContinuousBatchingLogitsProcessor):
    """Adds the noise of a request's `seed` to its scores (S, V); 0 stands for a request that does not sample."""

    supported_kwargs = {"seed": int}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """(S,) int32: a key for the token that follows the request's tokens so far."""
        states = [request.state for request in requests_with_new_token]
        # Its position in the sequence is the same after a preemption, and however the prompt was cut.
        keys = [noise_key(state.logit_processor_kwargs.get("seed"), state.position_offset) for state in states]
        return torch.tensor(keys, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        keys = tensor_arg[: len(scores)]
        if scores.device.type != "cpu":
            return torch.where(keys[:, None] != 0, scores + gumbel_noise(keys, scores.shape[-1]), scores)
        rows = keys.nonzero().flatten()
        return scores.index_add(0, rows, gumbel_noise(keys[rows], scores.shape[-1])) if len(rows) else scores


def noise_key(seed: int | None, position: int) -> int:
    """An int32 that is not 0, or 0 without a seed."""
    if seed is None:
        return 0
    digest = hashlib.sha256(f"{seed},{position}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True) or 1


def gumbel_noise(keys: torch.Tensor, size: int) -> torch.Tensor:
    """(S,) int32 keys -> (S, size) float32 Gumbel noise, from a hash of the key and the column alone."""
    counters = torch.arange(size, dtype=torch.int32, device=keys.device)
    second = _mixed(~keys[:, None])  # mixed in between, so that no two rows are shifts of one another
    words = _mixed(_mixed(counters + keys[:, None]) ^ second)
    uniform = (_shifted(words, 9).float() + 0.5) / 2**23  # of 23 bits and a half, exact: neither 0 nor 1
    return -(-uniform.log()).log()


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """The rounds of the integer hash "triple32", on int32 with arithmetic modulo 2^32."""
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        words = (words ^ _shifted(words, shift)) * (factor - 2**32)
    return words ^ _shifted(words, 14)


def _shifted(words: torch.Tensor, shift: int) -> torch.Tensor:
    """words >> shift, without the sign bits that int32 would shift in."""
    return (words >> shift) & ((1 << (32 - shift)) - 1)
