"""Continuous batching of Transformers, each request answered by its own expert.

Transformers packs the tokens of all running requests into one row (1, T) and keeps keys and values in blocks of its
own; each step here names the expert of each of those tokens. Requests share the blocks of a common prefix only where
they have the same expert.

```python
with model.continuous_batching_context_manager() as manager:    # or manager = model.init_continuous_batching()
    request_id = manager.add_request(input_ids, max_new_tokens=50, expert_index="math")
    request_id = manager.add_request(input_ids, max_new_tokens=50)              # routed, as `generate` does it
    for output in manager: ...      # output.generated_tokens, .expert_index, .expert_name, .router_probabilities
choice = manager.choose_expert(input_ids)     # the expert first: choice.expert_name, .router_probabilities; then
manager.add_request(input_ids, expert_index=choice)
```

Adding a request runs the router in the calling thread, the first blocks on one prompt: a server's event loop should
leave it to another thread. Every output of a request, those of a stream too, carries its expert.
"""

import queue
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import model_runner, utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.input_outputs import (
    ContinuousBatchingAsyncIOs,
    ContinuousBatchingIOs,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from .active_experts import ActiveExperts, sent
from .channel_merged_layers import PerExpert
from .expert_caches import BatchExperts

QUEUE_SECONDS = 10


@dataclass
class BatchCall:
    """A call of `generate_batch`: the experts it was given for `add_requests`, and the error that this ended in.

    Transformers hands over the one to no one and only logs the other.
    """

    experts: list[int] | None
    error: Exception | None = None


batch_call: ContextVar[BatchCall | None] = ContextVar("batch_call", default=None)


@dataclass(frozen=True)
class ExpertChoice:
    """The expert of one request.

    Attributes:
        router_probabilities: of all experts, where the router chose.
    """

    expert_index: int
    expert_name: str
    router_probabilities: tuple[float, ...] | None = None


@dataclass
class ExpertGenerationOutput(GenerationOutput):
    """What Transformers gives for a request, and the expert that answers it; see `ExpertChoice`."""

    expert_index: int | None = None
    expert_name: str | None = None
    router_probabilities: tuple[float, ...] | None = None


@dataclass
class ExpertRequestState(RequestState):
    """A request and its expert, through copies (several returned sequences) and restarts (when the cache is full)."""

    choice: ExpertChoice | None = None

    def create_equivalent_initial_request(self) -> "ExpertRequestState":
        state = super().create_equivalent_initial_request()
        state.__class__, state.choice = ExpertRequestState, self.choice  # Transformers makes it of its own class
        return state

    def to_generation_output(self) -> ExpertGenerationOutput:
        output = super().to_generation_output()
        return ExpertGenerationOutput(
            **{field.name: getattr(output, field.name) for field in fields(output)},
            expert_index=self.choice.expert_index,
            expert_name=self.choice.expert_name,
            router_probabilities=self.choice.router_probabilities,
        )


class ExpertPagedCache(PagedAttentionCache):
    """Keys and values in blocks that requests of one expert share, and others never.

    Blocks are found by a hash of their tokens: each expert's tokens are given numbers of their own there.
    """

    scheduler: Scheduler
    vocab_size: int

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        state = self.scheduler.waiting_requests[request_id]
        return super().search_prefix_match(request_id, self._own_numbers(prompt_ids, state))

    def mark_complete_blocks(self, state: ExpertRequestState, complete_blocks: dict[str, int]):
        renumbered = SimpleNamespace(
            request_id=state.request_id,
            status=state.status,
            initial_tokens=self._own_numbers(state.initial_tokens, state),
            generated_tokens=self._own_numbers(state.generated_tokens, state),
        )
        super().mark_complete_blocks(renumbered, complete_blocks)

    def _own_numbers(self, tokens: list[int], state: ExpertRequestState) -> list[int]:
        first = (state.choice.expert_index + 1) * self.vocab_size
        return [first + token for token in tokens]


class PackedModel:
    """The model as a step of continuous batching calls it: with the experts of the tokens of that step.

    Attributes:
        experts: of the step, known on the host; None: read from `buffer`.
        buffer: (1, tokens) int64 on the device, of which a step of q tokens reads the first q: always the same memory,
            for graphs that were captured once.
    """

    def __init__(self, model: nn.Module, max_tokens: int):
        self.model = model
        self.experts: BatchExperts | None = None
        self.buffer = torch.zeros(1, max_tokens, dtype=torch.int64, device=model.device)

    def _supports_logits_to_keep(self) -> bool:
        return True

    def __call__(self, input_ids: torch.Tensor, **inputs):
        experts = self.experts
        if experts is None:
            expert_index = self.buffer[:, : input_ids.shape[1]]
            experts = BatchExperts(expert_index, ActiveExperts.mixed(expert_index))
        # The decoder writes it into its config for the time of the call, where threads that route would read it. The
        # mask says the same; without one, attention is causal anyway.
        inputs.pop("is_causal", None)
        return self.model(input_ids=input_ids, expert_index=experts, **inputs)


class ExpertBatchingManager(ContinuousBatchingManager):
    """`ContinuousBatchingManager` whose requests have an expert each.

    Attributes:
        max_request_tokens: the most tokens of one request, its answer included, from `start` or `warmup` on.
    """

    max_request_tokens: int
    _packed: PackedModel

    def choose_expert(
        self,
        input_ids: Sequence[int],
        expert_index: str | int | ExpertChoice | None = None,
        router_input_ids: Sequence[int] | None = None,
    ) -> ExpertChoice:
        """Who answers a prompt: the expert given by name or number, else the pinned one, else the router's choice.

        Args:
            input_ids: the prompt's tokens.
            router_input_ids: what the router reads instead, such as `model.router_inputs` gives for a conversation.

        Raises:
            ValueError: an unknown expert, or a query that cannot be routed.
        """
        config = self.model.config
        if isinstance(expert_index, ExpertChoice):
            return expert_index
        expert_index = self.model.pinned_expert if expert_index is None else expert_index
        if expert_index is not None:
            number = config.expert_id(expert_index)
            return ExpertChoice(number, config.expert_names[number])
        routing = self.model.route_prompts(
            torch.tensor([list(input_ids)], device=self.model.device),
            router_input_ids=None if router_input_ids is None else torch.tensor([list(router_input_ids)]),
        )
        number = routing.expert_index.item()
        return ExpertChoice(number, config.expert_names[number], tuple(routing.probabilities[0].tolist()))

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        expert_index: str | int | ExpertChoice | None = None,
        router_input_ids: Sequence[int] | None = None,
        **logit_processor_kwargs,
    ) -> str | None:
        """As in Transformers, answered by one expert; see `choose_expert`.

        Args:
            eos_token_id: the tokens that end this answer. None, or those of all experts together, as the checkpoint's
                generation config has them: those of the request's own expert.

        Returns:
            The request's id; None where another process drives this one (tensor parallel).

        Raises:
            ValueError: a prompt that is no list of token ids or too long, the id of a request that runs, an unknown
                expert, or a query that cannot be routed. Such a request harms no other.
            RuntimeError: the manager has stopped, or its queue stays full.
        """
        if not self.is_tp_driver:
            return None
        self._check_accepts()
        input_ids = self._checked_prompt(input_ids)
        max_new_tokens = self._checked_length(len(input_ids), max_new_tokens)
        self.logit_processor.check_kwargs(logit_processor_kwargs)
        choice = self.choose_expert(input_ids, expert_index, router_input_ids)
        eos_token_id = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        state = ExpertRequestState(
            request_id=request_id or "",
            initial_tokens=input_ids,
            num_children=self.num_return_sequences - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends_of(choice, eos_token_id),
            streaming=streaming,
            logit_processor_kwargs=logit_processor_kwargs,
            choice=choice,
        )
        with self._request_lock:  # so that no other thread adds the same id in between
            if request_id is None:
                state.request_id, self._request_counter = f"req_{self._request_counter}", self._request_counter + 1
            else:
                self._check_is_new(request_id)
            try:
                self.input_queue.put(state, timeout=QUEUE_SECONDS)
            except queue.Full:
                waiting = self.input_queue.maxsize
                raise RuntimeError(f"the request cannot be added: {waiting} others wait, and none has begun") from None
        self._check_accepts()  # it may have stopped meanwhile, and nobody would answer
        self._wake_up_loop.set()
        return state.request_id

    def _check_accepts(self):
        denial = self.background_thread_status.can_accept_new_requests()
        if denial is not None:
            raise RuntimeError(f"the request cannot be added: {denial}") from self.background_thread_status.fatal_error

    def add_requests(self, inputs: list[list[int]], *args, expert_index=None, **kwargs) -> list[str]:
        """`add_request` for each of the B `inputs`, with the same options, and experts as in `generate`."""
        call = batch_call.get() or BatchCall(None)
        expert_index = call.experts if expert_index is None else expert_index
        experts = [None] * len(inputs)
        if expert_index is not None:
            experts = self.model.expert_ids(expert_index, len(inputs)).tolist()
        try:
            return [
                self.add_request(input_ids, None, *args, expert_index=expert, **kwargs)
                for input_ids, expert in zip(inputs, experts, strict=True)
            ]
        except Exception as error:
            call.error = error
            raise

    def _ends_of(self, choice: ExpertChoice, eos_token_id: int | list[int] | None) -> int | list[int] | None:
        tokens = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        own = self.model.own_end_tokens(tokens)
        return eos_token_id if own is None else own[choice.expert_index]

    def _checked_prompt(self, input_ids: Sequence[int]) -> list[int]:
        vocab_size = self.model.config.vocab_size
        tokens = [int(token) for token in input_ids]
        if not tokens:
            raise ValueError("the prompt has no tokens: expected one at least")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(
                f"the prompt holds the token ids {min(tokens)} to {max(tokens)}, expected 0 to {vocab_size - 1}"
            )
        return tokens

    def _checked_length(self, prompt_length: int, max_new_tokens: int | None) -> int:
        """How many tokens a request may generate, by `generate`'s rules; ValueError where that is none or too many."""
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_length - prompt_length
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens} tokens can follow a prompt of {prompt_length}, expected one at least")
        self._processor()
        if prompt_length + max_new_tokens > self.max_request_tokens:
            raise ValueError(
                f"the prompt has {prompt_length} tokens and max_new_tokens is {max_new_tokens}, but one request can "
                f"have {self.max_request_tokens} in all"
            )
        return max_new_tokens

    def _check_is_new(self, request_id: str):
        scheduler = self._processor().scheduler
        with self.input_queue.mutex:
            added = {state.request_id for state in self.input_queue.queue}
        if any(request_id in known for known in (added, scheduler.waiting_requests, scheduler.active_requests)):
            raise ValueError(f"a request {request_id!r} is not finished yet: expected an id of its own")

    def start(self):
        self._processor()  # here, so that a cache that does not fit is the caller's error
        super().start()

    def warmup(self):
        self._processor().warmup(self._packed)
        self.warmed_up = True

    def _processor(self) -> ContinuousBatchProcessor:
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        return self.batch_processor

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """As in Transformers, which creates it or resets the one there is."""
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            cache, config = processor.cache, self.model.config
            self._packed = PackedModel(self.model, processor.max_batch_tokens)
            self.max_request_tokens = model_runner.infer_max_single_request_tokens(cache)
            if has_learned_positions(self.model):
                self.max_request_tokens = min(self.max_request_tokens, config.text_config.max_position_embeddings)
            cache.__class__ = ExpertPagedCache  # Transformers makes its own
            cache.scheduler, cache.vocab_size = processor.scheduler, config.vocab_size
        return processor

    def _generation_step(self):
        """One step of all running requests, with the experts of their tokens in the order in which they are packed."""
        processor, packed = self.batch_processor, self._packed
        inputs = processor.inputs_and_outputs
        requests = running_requests(inputs)
        tokens, kept = [], []
        for request in requests:
            expert = request.state.choice.expert_index
            tokens += [expert] * request.query_length
            kept += [expert] * request.has_new_token
        kept += tokens[:1] * (len(requests) - len(kept))  # the head is given as many tokens, the rest the first one
        with utils.stream_context(inputs.compute_stream):  # behind the step before, which may still run
            if processor.model_runner.pad_inputs:
                packed.buffer[0, : len(tokens)] = sent(tokens, self.model.device)
            else:
                packed.experts = packed_experts(tokens, kept, self.model.device)
        processor._generation_step(packed)


def check_paged_attention(model: PreTrainedModel):
    """ValueError for attention without a paged form, or whose paged form is another function or cannot route."""
    base, name = model.config.text_config.model_type, model.config._attn_implementation
    if not model._supports_attention_backend:
        raise ValueError(f"continuous batching does not run with {base!r}, whose attention has no paged form")
    if name in ("eager", "paged|eager"):
        raise ValueError(
            f"continuous batching does not run with the attention implementation {name!r}, which in its paged form "
            'drops soft-capping and cannot route: load the model with attn_implementation="sdpa" or flash attention, '
            "or use generate"
        )


def has_learned_positions(model: nn.Module) -> bool:
    """Whether a token's position is looked up, so that there is a last one."""
    return any(isinstance(module, PerExpert) and module.is_lookup for module in model.modules())


def running_requests(inputs: ContinuousBatchingIOs | ContinuousBatchingAsyncIOs) -> list[FutureRequestState]:
    """The requests of the step that was prepared, in the order in which their tokens are packed."""
    if isinstance(inputs, ContinuousBatchingAsyncIOs):
        inputs = inputs.io_pairs[inputs.current_pair].host_io
    return inputs.requests_in_batch


def packed_experts(tokens: list[int], kept: list[int], device: torch.device) -> BatchExperts:
    """Of the expert of each token of a packed row, and of each token whose logits are made."""
    expert_index = sent(tokens, device)[None]
    active = ActiveExperts.from_index(expert_index, tokens)
    if active.expert is None:
        active = replace(active, kept=ActiveExperts.from_index(sent(kept, device)[None], kept))
    return BatchExperts(expert_index, active, tuple(tokens))
