"""`generate` of channel-merged models: which expert answers each prompt, and what becomes of a cache of others.

A cache changes what a call costs, never its text: every call routes its prompts, and where other experts than those
that filled the cache are to answer, the cache is emptied and the whole conversation read anew.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Cache,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .expert_batching import BatchCall, ExpertBatchingManager, batch_call, check_paged_attention
from .expert_caches import BatchExperts, check_not_filled, empty_cache, experts_of_cache
from .expert_stopping import ExpertEosCriteria
from .model_outputs import RouterOutput
from .router_inputs import router_messages

logger = logging.get_logger(__name__)


@dataclass
class _Call:
    """What a call of `generate` was told, for the places inside of it that Transformers hands other arguments."""

    router_inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # arguments of `route_prompts`
    mask_length: int | None = None  # of the attention mask that the caller gave
    is_assistant: bool = False
    routing: RouterOutput | None = None


_call: ContextVar[_Call | None] = ContextVar("generate_call", default=None)


class ExpertGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose prompts are answered by one expert each."""

    def generate(
        self,
        *args,
        expert_index: str | int | list[str | int] | torch.LongTensor | None = None,
        router_input_ids: torch.LongTensor | None = None,
        router_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """`GenerationMixin.generate`, each prompt answered by one expert.

        A filled `past_key_values` goes on as it is where the experts that filled it also answer now. Where another one
        does, in any row, the cache is emptied in place and the prompts, which must then be the whole conversation, are
        read anew: the text is that of a call without a cache. Given only the new tokens (a longer attention mask), and
        nothing to choose an expert by, those that filled the cache answer.

        Args:
            expert_index: name, index, list of B of them, or (B,) int64 tensor; None: the pinned expert, or
                each prompt is routed, once.
            router_input_ids: (B, S) what the router reads instead of the prompts, such as the last user turn alone.
            router_attention_mask: (B, S), 1 for tokens and 0 for padding; None: all are tokens.

        Returns:
            As in Transformers. With `return_dict_in_generate=True` the output also carries, per prompt,
            `expert_index` (B,), and `router_logits` and `router_probabilities`, (B, N) float32, which are None where
            the experts were not routed.

        Raises:
            ValueError: a prompt of no tokens, experts or router inputs that do not fit the batch, or a cache of other
                experts that cannot be emptied or without the whole conversation.
        """
        if router_input_ids is None and router_attention_mask is not None:
            raise ValueError("router_attention_mask is given without router_input_ids")
        if router_input_ids is not None and expert_index is not None:
            raise ValueError("give expert_index or router_input_ids, not both: with the first, nothing is routed")
        named = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        prompts = next((given for given in (*named, *args[:1]) if given is not None), None)
        if isinstance(prompts, torch.Tensor) and prompts.dim() > 1 and prompts.shape[1] == 0:
            raise ValueError(
                f"the prompts have no tokens: their shape is {tuple(prompts.shape)}, expected one at least, "
                "such as the one that begins a text (bos_token_id)"
            )
        if self.pinned_expert is not None:
            router_input_ids = None
        if expert_index is not None:
            # Before the batch is known: a wrong name should not wait for the inputs to be prepared.
            self.expert_ids(expert_index, None)
            kwargs["expert_index"] = expert_index
        call = _Call()
        if router_input_ids is not None:
            call.router_inputs = {
                "router_input_ids": router_input_ids,
                "router_attention_mask": router_attention_mask,
            }
        if isinstance(kwargs.get("attention_mask"), torch.Tensor):
            call.mask_length = kwargs["attention_mask"].shape[-1]
        generation_config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        call.is_assistant = bool(getattr(generation_config, "is_assistant", False))
        token = _call.set(call)
        try:
            outputs = super().generate(*args, **kwargs)
        finally:
            _call.reset(token)
        if isinstance(outputs, ModelOutput) and call.routing is not None:
            outputs["expert_index"] = call.routing.expert_index
            outputs["router_logits"], outputs["router_probabilities"] = call.routing.logits, call.routing.probabilities
        return outputs

    def router_inputs(
        self, tokenizer: PreTrainedTokenizerBase, conversations: list[dict[str, Any]] | list[list[dict[str, Any]]]
    ) -> dict[str, torch.Tensor]:
        """`router_input_ids` and `router_attention_mask` for `generate`, by which system prompts decide nothing.

        Args:
            tokenizer: the checkpoint's; its default chat template is the one that the router was trained with.
            conversations: B of them, or one, as lists of messages. The router reads the last turn of the user, or all
                of the user's turns, as `config.router["context"]` says.

        Returns:
            Both (B, S) int64, on the CPU.

        Raises:
            ValueError: a conversation without a message of the user.
        """
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        queries = [router_messages(messages, self.config.router["context"]) for messages in conversations]
        encoded = tokenizer.apply_chat_template(
            queries, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        return {"router_input_ids": encoded["input_ids"], "router_attention_mask": encoded["attention_mask"]}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, expert_index=None, **model_kwargs
    ):
        """Called once per `generate`, before beams and returned sequences multiply the batch: the place to route."""
        call = _call.get() or _Call()
        embeds, cache = model_kwargs.get("inputs_embeds"), model_kwargs.get("past_key_values")
        inputs = input_ids if embeds is None else embeds
        cached = experts_of_cache(cache)
        whole = embeds is not None or call.mask_length in (None, inputs.shape[1])
        goes_on = cached is not None and (call.is_assistant or not (whole or call.router_inputs))
        if expert_index is None and not goes_on:
            expert_index = self.pinned_expert
        if expert_index is None:
            check_not_filled(cache)
        if expert_index is not None:
            call.routing = RouterOutput(expert_index=self.expert_ids(expert_index, len(inputs), inputs.device))
        elif goes_on:
            call.routing = RouterOutput(expert_index=cached.of_prompts(len(inputs), expand_size))
        else:
            # With inputs_embeds, `generate` hands over empty input_ids.
            mask, ids = model_kwargs.get("attention_mask"), input_ids if embeds is None else None
            call.routing = self.route_prompts(ids, mask, embeds, **call.router_inputs)
        if cached is not None:
            self._hand_over(cache, cached, call.routing.expert_index.tolist(), expand_size, whole)
        return super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, expert_index=call.routing.expert_index, **model_kwargs
        )

    def _hand_over(self, cache: Cache, cached: BatchExperts, rows: list[int], expand_size: int, whole: bool):
        """Empty a cache that other experts filled than those of the prompts' `rows`, if the `whole` text is given."""
        if cached.are(rows, expand_size):
            return
        if not whole:
            names = [self.config.expert_names[expert] for expert in rows]
            raise ValueError(
                f"past_key_values was filled by other experts than those that are to answer ({', '.join(names)}), "
                "and only the new tokens are given: give the whole conversation as input_ids, for them to read it"
            )
        logger.info("Other experts answer than those that filled past_key_values: it is emptied and filled anew.")
        empty_cache(cache)

    def route_prompts(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        router_input_ids: torch.LongTensor | None = None,
        router_attention_mask: torch.Tensor | None = None,
    ) -> RouterOutput:
        """Route B prompts as `generate` does: by themselves, or by the router's own inputs, as given to `generate`."""
        if router_input_ids is None:
            return self.route(input_ids, attention_mask, inputs_embeds)
        prompts = input_ids if inputs_embeds is None else inputs_embeds
        input_ids, attention_mask = router_input_ids, router_attention_mask
        if input_ids.dim() != 2 or len(input_ids) != len(prompts):
            raise ValueError(
                f"router_input_ids has the shape {tuple(input_ids.shape)}, expected (B, S) for {len(prompts)} prompts"
            )
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"router_attention_mask has the shape {tuple(attention_mask.shape)}, expected that of "
                    f"router_input_ids, {tuple(input_ids.shape)}"
                )
            attention_mask = attention_mask.to(prompts.device)
        return self.route(input_ids.to(prompts.device), attention_mask, whole=True)

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args, **kwargs) -> StoppingCriteriaList:
        """Where experts end their answers with different tokens, each row stops at those of its own expert.

        That is so as long as `eos_token_id` is that of all experts together, as the checkpoint's generation config
        has it; any other one stops all rows alike.
        """
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        tokens = generation_config._eos_token_tensor
        ends = None if tokens is None else self.own_end_tokens(tokens.tolist())
        if ends is None:
            return criteria
        own = ExpertEosCriteria(ends, _call.get().routing.expert_index)
        replaced = [own if getattr(criterion, "eos_token_id", None) is tokens else criterion for criterion in criteria]
        return StoppingCriteriaList(replaced)

    def own_end_tokens(self, eos_token_ids: list[int]) -> list[list[int]] | None:
        """The tokens that end each expert's answers, N lists; None where the ones asked for end all of them alike."""
        ends = self.config.expert_eos_token_ids
        if ends is None or {*eos_token_ids} != {token for end in ends.values() for token in end}:
            return None
        return [ends[name] for name in self.config.expert_names]

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        """A draft is handed the names of the experts; one that does not know them all routes, or knows no experts."""
        if assistant_model is not None and "expert_index" in model_kwargs:
            names = [self.config.expert_names[expert] for expert in model_kwargs["expert_index"].tolist()]
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "expert_index"}
            draft = assistant_model.config
            # Not by its class: the draft may run another copy of this code.
            if draft.model_type == self.config.model_type and {*names} <= {*draft.expert_names}:
                model_kwargs["expert_index"] = names
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs,
    ) -> ExpertBatchingManager:
        """As in Transformers; each request of the manager has its own expert. See expert_batching.py.

        `generation_config` is completed as by `generate`.

        Raises:
            ValueError: an attention implementation that cannot be packed, or that routing cannot run beside.
        """
        check_paged_attention(self)
        lengths = (generation_config and generation_config.max_length, self.generation_config.max_length)
        generation_config, _ = self._prepare_generation_config(generation_config)
        if generation_config.max_new_tokens is None and not any(lengths):
            generation_config.max_new_tokens = generation_config.max_length
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
        manager.__class__ = ExpertBatchingManager  # Transformers makes its own
        return manager

    def generate_batch(self, inputs: list[list[int]], *args, expert_index=None, **kwargs):
        """As in Transformers; each prompt is answered by one expert, `expert_index` as in `generate`."""
        if expert_index is not None:
            expert_index = self.expert_ids(expert_index, len(inputs)).tolist()
        call = BatchCall(expert_index)
        token = batch_call.set(call)
        try:
            outputs = super().generate_batch(inputs, *args, **kwargs)
        finally:
            batch_call.reset(token)
        if call.error is not None:
            raise call.error
        return outputs
