"""Which expert answers each row of a batch: the one that is given, that filled the cache, or that the router picks.

The router reads the features of the first blocks, run as the trunk expert; a hook on the last of them leaves the pass.
Each query is routed as a whole, once (Channel Merging, Zhang et al., arXiv 2412.15283).
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.utils import logging

from .active_experts import ActiveExperts, activate, active_or_none
from .chat_turns import ChatTurns
from .expert_caches import BatchExperts, check_not_filled, experts_of_cache
from .model_outputs import RouterOutput
from .router_inputs import check_one_query_a_row, check_router_mask, last_turns, shorten

logger = logging.get_logger(__name__)

ExpertIndex = str | int | list[str | int] | torch.LongTensor | BatchExperts


class _TrunkDone(Exception):
    """Leaves the forward pass once the router's features are there."""

    def __init__(self, hidden_states: torch.Tensor):
        self.hidden_states = hidden_states


def stop_after_trunk(block: nn.Module, args: tuple, output):
    active = active_or_none()
    if active is not None and active.trunk_only:
        raise _TrunkDone(output[0] if isinstance(output, tuple) else output)


class ExpertRoutingMixin:
    """Routing, for a model with a `config`, the wrapped `model` and a `router`."""

    def freeze_for_router_training(self):
        """Leave only the router trainable, for the Trainer or any other loop: `labels` are experts from here on.

        Its loss is `model(input_ids, attention_mask, labels=...)` with (B,) experts, which a dataset holds in a column
        `label` or `labels`. For PEFT, call this before `get_peft_model`.
        """
        self.requires_grad_(False)
        self.router.requires_grad_(True)
        # By it the Trainer counts what a loss is a mean of: all labels, where a language model's first is no target.
        self.loss_type = "ForSequenceClassification"

    def expert_ids(self, expert_index: ExpertIndex, batch_size: int | None, device=None) -> torch.LongTensor:
        """Experts given by name or index, one for all rows or one per row, as a (B,) int64 tensor.

        Raises:
            ValueError: an unknown name, an index out of range, or not one expert per row.
        """
        return torch.tensor(self._expert_rows(expert_index, batch_size), dtype=torch.int64, device=device)

    def _expert_rows(self, expert_index: ExpertIndex, batch_size: int | None) -> list[int]:
        """`expert_ids` on the host; a tensor is read, once."""
        if isinstance(expert_index, torch.Tensor):
            if expert_index.is_floating_point() or expert_index.dtype == torch.bool or expert_index.dim() > 1:
                raise ValueError(
                    "expert_index must be an integer tensor of shape (B,), "
                    f"got {expert_index.dtype} of shape {tuple(expert_index.shape)}"
                )
            expert_index = expert_index.tolist()
        try:
            experts = None if isinstance(expert_index, str) else list(expert_index)
        except TypeError:
            experts = None
        if experts is None:
            experts = [expert_index] * (1 if batch_size is None else batch_size)
        rows = [self.config.expert_id(expert) for expert in experts]
        if batch_size is not None and len(rows) != batch_size:
            raise ValueError(f"expert_index names {len(rows)} experts for a batch of {batch_size} rows")
        return rows

    @torch.no_grad()
    def route(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        *,
        top_k: int | None = None,
        whole: bool = False,
    ) -> RouterOutput:
        """Which expert should answer each query.

        Of a chat, the last turn of the user is read, or all of the user's turns, as `config.router["context"]` says:
        found by `config.router["turns"]`, the markers of the checkpoint's chat templates. Where there are none, where
        none is in a prompt, and of `inputs_embeds`, all is read. Of a query longer than
        `config.router["max_tokens"]`, its first and last tokens are read. A query of padding only, or of no tokens,
        has zero logits and the default expert.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, H); `attention_mask` (B, T), padding on any side.
            top_k: also return this many most probable experts, at most N.
            whole: read all of every query, whatever turns are in it, as of what `router_inputs` made.

        Raises:
            ValueError: top_k is not a number from 1 to N, a mask that is not (B, T), or a query whose features are not
                finite.
        """
        num_experts = self.config.num_experts
        if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= num_experts):
            raise ValueError(f"top_k is {top_k!r}, expected 1 to {num_experts}, the number of experts")
        if not whole:
            input_ids, attention_mask = self._read_by_router(input_ids, attention_mask)
        # Through __call__, so that the hooks of sharded and offloaded models run.
        routing = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            router_only=True,
            return_dict=True,
        )
        if top_k is not None:
            probabilities, experts = routing.probabilities.sort(dim=-1, descending=True, stable=True)
            routing["top_experts"], routing["top_probabilities"] = experts[:, :top_k], probabilities[:, :top_k]
        return routing

    def _read_by_router(
        self, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
        """Of every chat in a batch, the turns of the user that the router reads."""
        if input_ids is None or self.config.router["turns"] is None:
            return input_ids, attention_mask
        if attention_mask is not None:
            check_router_mask(attention_mask, input_ids)
        turns = ChatTurns.from_dict(self.config.router["turns"])
        return last_turns(input_ids, attention_mask, turns, self.config.router["context"])

    def router_logits(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.FloatTensor:
        """(B, N) float32 logits, running at most the first `config.router["layers"]` blocks, as the trunk expert."""
        return self.router(self.router_features(input_ids, attention_mask, inputs_embeds))

    @torch.no_grad()
    def router_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """What the router reads of each query: (B, F) float32, on the router's device.

        They come from frozen weights, so training may compute them once and give them to `model.router`.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None:
            check_router_mask(attention_mask, inputs)
        else:
            attention_mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        max_tokens = self.config.router["max_tokens"]
        input_ids, attention_mask, inputs_embeds = shorten(input_ids, attention_mask, inputs_embeds, max_tokens)
        hidden_states = None
        if self.router.reads_trunk:
            hidden_states = self._trunk(input_ids, attention_mask, inputs_embeds)
        weight = self.router.head.weight
        reached = attention_mask if hidden_states is None else hidden_states
        device = reached.device if weight.is_meta else weight.device  # an offloaded router comes to its inputs
        hidden_states, input_ids = (None if part is None else part.to(device) for part in (hidden_states, input_ids))
        return self.router.features(hidden_states, attention_mask.to(device), input_ids)

    def _trunk(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.FloatTensor:
        """(B, T, H) hidden states after the first blocks, run as the trunk expert."""
        decoder = self.model.base_model
        arguments = {"attention_mask": attention_mask, "use_cache": False}
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        trunk = ActiveExperts(self.config.expert_id(self.config.router["trunk_expert"]), trunk_only=True)
        # Dropout would blur the features that the router learns from. Nothing is written in eval mode, so that threads
        # may share the model.
        training = [module for module in decoder.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with activate(trunk):
                decoder(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)
        except _TrunkDone as done:
            hidden_states = done.hidden_states
        finally:
            for module in training:
                module.training = True
        return hidden_states

    def router_loss(
        self,
        router_logits: torch.FloatTensor,
        expert_labels: ExpertIndex,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.FloatTensor:
        """() cross-entropy of (B, N) logits with the right experts, a mean over the queries.

        Args:
            num_items_in_batch: what the Trainer divides by instead of B: all queries of accumulated batches.
        """
        if num_items_in_batch is not None and self.loss_type == "ForCausalLM":
            raise ValueError(
                "the Trainer counts the labels of a language model, one too few for the router: call "
                "model.freeze_for_router_training() before the Trainer is made"
            )
        if not isinstance(expert_labels, torch.Tensor):
            expert_labels = self.expert_ids(expert_labels, len(router_logits))
        total = F.cross_entropy(router_logits, expert_labels.to(router_logits.device), reduction="sum")
        return total / (len(router_logits) if num_items_in_batch is None else num_items_in_batch)

    def router_probabilities(self, router_logits: torch.FloatTensor) -> torch.FloatTensor:
        """(B, N) logits -> (B, N) float32 probabilities: the one place that knows the router's temperature."""
        return (router_logits.float() / self.config.router.get("temperature", 1.0)).softmax(-1)

    def choose_experts(self, router_logits: torch.FloatTensor) -> torch.LongTensor:
        """(B, N) logits -> (B,) experts: the pinned one; while untrained or in doubt (`fallback`), the default one."""
        default = self.config.expert_id(self.pinned_expert or self.config.router["default_expert"])
        if self.pinned_expert is not None:
            return torch.full_like(router_logits[:, 0], default, dtype=torch.int64)
        if not self.router.is_trained:
            logger.warning_once(
                "The router of this model is untrained: every query is answered by "
                f"{self.config.expert_names[default]!r}. "
                "Train it with `channel-merge train-router`, or name an expert with `expert_index`."
            )
            return torch.full_like(router_logits[:, 0], default, dtype=torch.int64)
        probabilities = self.router_probabilities(router_logits)
        experts = probabilities.argmax(-1)  # the first of equals
        threshold = self.config.router["threshold"]
        if self.config.router["fallback"] == "likely":
            return experts.where(probabilities[:, default] <= 1 - threshold, default)
        return experts.where(probabilities.amax(-1) >= threshold, default)

    def _route(self, input_ids, attention_mask, inputs_embeds) -> RouterOutput:
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs.shape[1] == 0:
            logits = torch.zeros(len(inputs), self.config.num_experts, device=inputs.device)
            known = torch.ones(len(inputs), device=inputs.device)
        else:
            features = self.router_features(input_ids, attention_mask, inputs_embeds)
            logits, known = self.router(features), self.router.known_share(features)
        if input_ids is None and not self.router.reads_trunk:
            logger.warning_once(
                "This model's router reads token ids, and there are only embeddings: "
                f"{self.config.router['default_expert']!r} answers. Give input_ids, or name an expert."
            )
            has_tokens = torch.zeros(logits.shape[:1], dtype=torch.bool, device=logits.device)
        elif attention_mask is None:
            has_tokens = torch.full(logits.shape[:1], inputs.shape[1] > 0, device=logits.device)
        else:
            has_tokens = (attention_mask != 0).any(-1).to(logits.device)
        logits = logits.masked_fill(~has_tokens[:, None], 0.0)
        if not logits.isfinite().all():
            row = int((~logits.isfinite()).any(-1).nonzero()[0])
            raise ValueError(
                f"query {row} cannot be routed: its router logits are {logits[row].tolist()}, expected finite "
                "numbers: its embeddings, the first blocks or the router hold NaN or overflow in this dtype"
            )
        default = self.config.expert_id(self.pinned_expert or self.config.router["default_expert"])
        none_of_these = known < self.config.router["min_known"]
        expert_index = self.choose_experts(logits).where(has_tokens & ~none_of_these, default)
        return RouterOutput(
            logits=logits,
            expert_index=expert_index,
            probabilities=self.router_probabilities(logits),
            known=known,
            none_of_these=none_of_these,
        )

    def _experts_of_batch(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.FloatTensor | None,
        past_key_values: Cache | None,
        expert_index: ExpertIndex | None,
        position_ids: torch.LongTensor | None = None,
    ) -> tuple[BatchExperts, torch.FloatTensor | None]:
        """Experts of a batch: those given, that filled the cache, that are pinned, or the router's and its logits.

        A filled cache keeps the experts that filled it; another expert's keys and values would be wrong silently.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        cached, router_logits = experts_of_cache(past_key_values), None
        if isinstance(expert_index, BatchExperts):
            return expert_index, None
        if expert_index is None and cached is None:
            expert_index = self.pinned_expert
        if expert_index is not None and torch.compiler.is_dynamo_compiling():
            experts, cached = self._experts_in_graph(inputs, expert_index), None
        elif cached is not None and (expert_index is None or cached.came_from(expert_index)):
            experts = cached
        elif isinstance(expert_index, torch.Tensor) and expert_index.dim() == 2:
            experts, cached = self._experts_of_tokens(inputs, expert_index), None
        elif expert_index is not None:
            given = expert_index if isinstance(expert_index, torch.Tensor) else None
            experts = BatchExperts.of_rows(self._expert_rows(expert_index, len(inputs)), inputs.device, given)
        else:
            check_not_filled(past_key_values)
            check_one_query_a_row(position_ids, attention_mask)
            read_ids, read_mask = self._read_by_router(input_ids, attention_mask)
            routing = self._route(read_ids, read_mask, inputs_embeds)
            if read_ids is input_ids and self.router.is_trained:
                logger.warning_once(
                    "The router read all of the input, an answer in it, too: to compare answers to one question "
                    "(loglikelihood) give `expert_index`, pin an expert by from_pretrained(..., expert=NAME), or use "
                    "the chat template, of which only the user's turn is read."
                )
            experts = BatchExperts.of_rows(routing.expert_index.tolist(), inputs.device, routing.expert_index)
            router_logits = routing.logits
        if cached is not None:
            experts = self._of_filled_cache(experts, cached, len(inputs))
        return experts, router_logits

    def _experts_of_tokens(self, inputs: torch.Tensor, expert_index: torch.LongTensor) -> BatchExperts:
        """Experts given for each token of the (B, T, ...) `inputs`; ValueError where they do not fit."""
        if expert_index.is_floating_point() or expert_index.dtype == torch.bool:
            raise ValueError(f"expert_index must be an integer tensor, got {expert_index.dtype}")
        if expert_index.shape != inputs.shape[:2]:
            raise ValueError(
                f"expert_index has the shape {tuple(expert_index.shape)}, expected one expert for each batch row or "
                f"for each token, {tuple(inputs.shape[:2])}"
            )
        experts = BatchExperts.of_tokens(expert_index.to(inputs.device, torch.int64))
        for number in {*experts.rows}:
            self.config.expert_id(number)
        return experts

    def _experts_in_graph(self, inputs: torch.Tensor, expert_index: str | int | torch.LongTensor) -> BatchExperts:
        """The given experts while torch.compile traces, where nothing can be read from the device.

        No checks; one graph for each expert that is named, and one for all (B,) tensors, which run as mixed batches.
        """
        if isinstance(expert_index, torch.Tensor):
            return BatchExperts(expert_index, ActiveExperts.mixed(expert_index))
        active = ActiveExperts(self.config.expert_id(expert_index))
        return BatchExperts(inputs.new_full(inputs.shape[:1], active.expert, dtype=torch.int64), active)

    def _of_filled_cache(self, experts: BatchExperts, cached: BatchExperts, batch_size: int) -> BatchExperts:
        """The experts of a batch that goes on from a cache; ValueError if others filled it."""
        names = self.config.expert_names
        for row, (wanted, filled) in enumerate(zip(experts.rows, cached.rows)):
            if wanted != filled:
                raise ValueError(
                    f"row {row} asks for expert {names[wanted]!r}, but past_key_values was filled by "
                    f"{names[filled]!r}: start from an empty cache to change the expert"
                )
        if len(cached.rows) == batch_size:
            return experts
        if len({*experts.rows, *cached.rows}) > 1:
            raise ValueError(
                f"past_key_values was filled by {len(cached.rows)} rows of different experts, but the batch has "
                f"{batch_size} rows: select the cache's rows by its own methods, such as batch_select_indices"
            )
        return BatchExperts.of_rows(cached.rows[:1] * batch_size, experts.expert_index.device)
