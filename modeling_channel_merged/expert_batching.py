"""Continuous batching of Transformers, each request answered by its own expert.

Transformers packs the tokens of all running requests into one row (1, T) and keeps keys and values in blocks of its
own; each step here names the expert of each of those tokens.

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

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from .active_experts import ActiveExperts
from .expert_caches import BatchExperts

# The experts that `generate_batch` was given, for `add_requests`, which it calls without them.
batch_experts: ContextVar[list[int] | None] = ContextVar("batch_experts", default=None)


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


class PackedModel:
    """The model as a step of continuous batching calls it: with the experts of the tokens of that step.

    Attributes:
        experts: of the step, known on the host; None: read from `buffer`.
        buffer: (1, tokens) int64 on the device, of which a step of q tokens reads the first q: always the same memory,
            for graphs that were captured once.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.experts: BatchExperts | None = None
        self.buffer: torch.LongTensor | None = None

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
    """`ContinuousBatchingManager` whose requests have an expert each."""

    def choose_expert(
        self,
        input_ids: Sequence[int],
        expert_index: str | int | ExpertChoice | None = None,
        router_input_ids: Sequence[int] | None = None,
    ) -> ExpertChoice:
        """The expert that answers a prompt: the one given by name or number, else the router's choice.

        Args:
            input_ids: the prompt's tokens.
            router_input_ids: what the router reads instead, such as `model.router_inputs` gives for a conversation.

        Raises:
            ValueError: an unknown expert, or a query that cannot be routed.
        """
        config = self.model.config
        if isinstance(expert_index, ExpertChoice):
            return expert_index
        if expert_index is not None:
            number = config.expert_id(expert_index)
            return ExpertChoice(number, config.expert_names[number])
        query = input_ids if router_input_ids is None else router_input_ids
        routing = self.model.route(torch.tensor([list(query)], dtype=torch.int64, device=self.model.device))
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
            ValueError: a prompt without tokens, an unknown expert, or one that cannot be routed.
            RuntimeError: the manager has stopped.
        """
        if not self.is_tp_driver:
            return None
        denial = self.background_thread_status.can_accept_new_requests()
        if denial is not None:
            raise RuntimeError(f"the request cannot be added: {denial}") from self.background_thread_status.fatal_error
        if len(input_ids) == 0:
            raise ValueError("the prompt has no tokens: expected one at least")
        self.logit_processor.check_kwargs(logit_processor_kwargs)
        choice = self.choose_expert(input_ids, expert_index, router_input_ids)
        if request_id is None:
            with self._request_lock:
                request_id, self._request_counter = f"req_{self._request_counter}", self._request_counter + 1
        config = self.generation_config
        state = ExpertRequestState(
            request_id=request_id,
            initial_tokens=list(input_ids),
            num_children=self.num_return_sequences - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=config.max_new_tokens if max_new_tokens is None else max_new_tokens,
            eos_token_id=self._ends_of(choice, config.eos_token_id if eos_token_id is None else eos_token_id),
            streaming=streaming,
            logit_processor_kwargs=logit_processor_kwargs,
            choice=choice,
        )
        self.input_queue.put(state, timeout=10)
        self._wake_up_loop.set()
        return request_id

    def add_requests(self, inputs: list[list[int]], *args, expert_index=None, **kwargs) -> list[str]:
        """`add_request` for each of the B `inputs`, with the same options, and experts as in `generate`."""
        if expert_index is None:
            expert_index = batch_experts.get()
        if expert_index is None or isinstance(expert_index, str | int):
            expert_index = [expert_index] * len(inputs)
        return [
            self.add_request(input_ids, None, *args, expert_index=expert, **kwargs)
            for input_ids, expert in zip(inputs, expert_index, strict=True)
        ]

    def _ends_of(self, choice: ExpertChoice, eos_token_id: int | list[int] | None) -> int | list[int] | None:
        tokens = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        own = self.model.own_end_tokens(tokens)
        return eos_token_id if own is None else own[choice.expert_index]

    def warmup(self):
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        self.batch_processor.warmup(self._packed_model())
        self.warmed_up = True

    def _packed_model(self) -> PackedModel:
        if not hasattr(self, "_packed"):
            self._packed = PackedModel(self.model)
            length = self.batch_processor.max_batch_tokens
            self._packed.buffer = torch.zeros(1, length, dtype=torch.int64, device=self.model.device)
        return self._packed

    def _generation_step(self):
        """One step of all running requests, with the experts of their tokens in the order in which they are packed."""
        processor, packed = self.batch_processor, self._packed_model()
        requests = running_requests(processor)
        tokens, kept = [], []
        for request in requests:
            expert = request.state.choice.expert_index
            tokens += [expert] * request.query_length
            kept += [expert] * request.has_new_token
        kept += tokens[:1] * (len(requests) - len(kept))  # the head is given as many tokens, the rest the first one
        if processor.model_runner.pad_inputs:
            packed.buffer[0, : len(tokens)] = torch.tensor(tokens)
        else:
            packed.experts = packed_experts(tokens, kept, self.model.device)
        processor._generation_step(packed)


def running_requests(processor) -> list:
    """The requests of the step that was prepared, in the order in which their tokens are packed."""
    inputs = processor.inputs_and_outputs
    if processor.use_async_batching:
        inputs = inputs.io_pairs[inputs.current_pair].host_io
    return inputs.requests_in_batch


def packed_experts(tokens: list[int], kept: list[int], device: torch.device) -> BatchExperts:
    """Of the expert of each token of a packed row, and of each token whose logits are made."""
    expert_index = torch.tensor([tokens], device=device)
    active = ActiveExperts.from_index(expert_index, tokens)
    if active.expert is None:
        active = replace(active, kept=ActiveExperts.from_index(torch.tensor([kept], device=device), kept))
    return BatchExperts(expert_index, active, tuple(tokens))
