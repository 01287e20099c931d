"""Channel-merged causal language models: N experts of one base architecture in one set of weights, and their router.

The model wraps the base architecture unchanged: `self.model` is the base's own causal language model whose linear
maps, token embedding and norms were swapped for their N-expert forms. Each query is answered by one expert, picked by
the router from the features of the first blocks run as the trunk expert (Channel Merging, Zhang et al., arXiv
2412.15283).
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import can_return_tuple

from .active_experts import ActiveExperts, activate, active_or_none, kept_tokens
from .channel_merged_layers import (
    ChannelIndexed,
    ChannelMergedLinear,
    PerExpert,
    find_modules,
    resize_channels,
    swap_modules,
)
from .configuration_channel_merged import ChannelMergedConfig
from .expert_caches import remember_experts
from .expert_router import keep_router_in_memory, make_router
from .generation_channel_merged import ExpertGenerationMixin
from .model_outputs import ChannelMergedCausalLMOutput, ChannelMergedModelOutput, RouterOutput
from .routing_channel_merged import ExpertIndex, ExpertRoutingMixin, stop_after_trunk
from .stored_tensors import check_stored_tensors, may_miss_tokens
from .tensor_parallel import TensorParallelMixin

# What the base architecture can do, its wrapper can.
MIRRORED_FLAGS = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_compatible_flash_implementations",
    "_can_compile_fullgraph",
    "supports_gradient_checkpointing",
)


class ChannelMergedPreTrainedModel(ExpertRoutingMixin, TensorParallelMixin, PreTrainedModel):
    """Wraps a base architecture: building and loading it."""

    config_class = ChannelMergedConfig
    config: ChannelMergedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["router"]
    # Tools read these on the class, where no base architecture is known; an instance has its own one's.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = supports_gradient_checkpointing = True
    # Checkpoints leave it out until the router is trained; it starts at zero.
    _keys_to_ignore_on_load_missing = [r"^router\.(ngrams\.weight|plain_tokens)$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, expert: str | None = None, **kwargs):
        """As in Transformers; `expert` pins one, see `pinned_expert`, for tools that hand over model arguments alone.

        A device map that offloads leaves the router in memory.

        Raises:
            ValueError: no such expert.
        """
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = dict(kwargs["device_map"])  # it is changed while loading
        config = kwargs.get("config")
        if expert is not None and getattr(config, "model_type", None) == cls.config_class.model_type:
            config.expert_id(expert)  # before weights are read
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if expert is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).pinned_expert = expert
        return loaded

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in Transformers, but tensors keep the names of this model's modules, whatever the base's files use."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def __init__(self, config: ChannelMergedConfig):
        inner_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.text_config), None)
        if inner_class is None:
            raise ValueError(f"text_config.model_type {config.text_config.model_type!r} has no causal language model")
        for flag in MIRRORED_FLAGS:
            setattr(self, flag, getattr(inner_class, flag))
        super().__init__(config)
        self.model = self._build_inner(inner_class._from_config(config.text_config))
        self.plan_channels()
        self.pinned_expert = config.pinned_expert
        self.router = make_router(config)
        self.decoder_blocks()[config.router["layers"] - 1].register_forward_hook(stop_after_trunk)
        self.post_init()

    def _build_inner(self, inner: PreTrainedModel) -> PreTrainedModel:
        modules = find_modules(inner)
        rows = dict(self.config.rows)
        for path, spec in modules.channel.items():
            if spec.tied_to is not None:
                rows[path] = rows.get(spec.tied_to, spec.out_features)
                tied = {f"{path}.rows.weight": f"{spec.tied_to}.rows.weight"}
                inner._tied_weights_keys, inner.all_tied_weights_keys = tied, dict(tied)
        swap_modules(inner, modules, rows, self.config.num_experts)
        return inner

    @property
    def pinned_expert(self) -> str | None:
        """The expert that answers wherever a call names none, instead of the router; None: the router's choice.

        An `expert_index` in a call wins, and a filled cache goes on as it is. A saved model is pinned only by
        `config.pinned_expert`. May be set, by name or index; ValueError for no expert of the model.
        """
        return self._pinned_expert

    @pinned_expert.setter
    def pinned_expert(self, expert: str | int | None):
        self._pinned_expert = None if expert is None else self.config.expert_names[self.config.expert_id(expert)]

    @torch.no_grad()
    def initialize_weights(self):
        """As in Transformers, whose base architectures do not know `channel_index`: one that was not loaded."""
        for module in self.channel_modules().values():
            if not (module.channel_index.is_meta or getattr(module.channel_index, "_is_hf_initialized", False)):
                module.reset_channel_index()
                if isinstance(module, ChannelMergedLinear):
                    module.derive()  # here, for an export that traces finds no values
        super().initialize_weights()

    def _init_weights(self, module: nn.Module):
        """The router starts at zero; the base architecture initialises everything else by its own rules."""
        if module is self.router.head or module is self.router.ngrams:
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)

    def decoder_blocks(self) -> nn.ModuleList:
        """The decoder blocks of the base architecture, in order."""
        count = self.config.num_hidden_layers
        decoder = self.model.base_model
        copies = [module.experts for module in decoder.modules() if isinstance(module, PerExpert)]
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count and module not in copies:
                return module
        raise ValueError(f"{type(self.model).__name__} has no list of {count} decoder blocks")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def embed(self, input_ids: torch.LongTensor, expert_index: ExpertIndex | None = None) -> torch.FloatTensor:
        """Token embeddings of experts, as `inputs_embeds` wants them.

        `get_input_embeddings()` alone, outside of a pass of the model, cannot know whose are wanted; its `weight`
        holds stored rows and is not indexed by tokens.

        Args:
            input_ids: (B, T) int64.
            expert_index: as in `forward`; None: the pinned expert, else the router's default one.

        Returns:
            (B, T, H).
        """
        if expert_index is None:
            expert_index = self.pinned_expert or self.config.router["default_expert"]
        with activate(ActiveExperts.from_index(self.expert_ids(expert_index, len(input_ids), input_ids.device))):
            return self.get_input_embeddings()(input_ids)

    def get_submodule(self, target: str) -> nn.Module:
        if target == "embeddings.word_embeddings":  # what PEFT's prompt learning, and nobody else, looks for first
            raise ValueError(
                "prompt tuning, p-tuning and prefix tuning (PEFT) put trained vectors before a prompt whose expert is "
                "not known yet and do not work on channel-merged models: train an expert's LoRA, or export the expert"
            )
        return super().get_submodule(target)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.model.set_output_embeddings(value)

    def channel_modules(self) -> dict[str, ChannelIndexed]:
        """The channel-merged modules by their path in the base architecture."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, ChannelIndexed)}

    @staticmethod
    def _load_pretrained_model(model: PreTrainedModel, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Part of loading: what Transformers would load wrongly without a word is refused."""
        check_stored_tensors(model, state_dict, checkpoint_files, load_config)
        if load_config.device_map is not None:
            keep_router_in_memory(load_config.device_map)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _initialize_missing_keys(self, is_quantized: bool):
        """Part of loading: an index cannot be made up, and a wrong one would read another channel's weights."""
        for path, module in self.channel_modules().items():
            if not getattr(module.channel_index, "_is_hf_initialized", False):
                raise ValueError(
                    f"the checkpoint has no model.{path}.channel_index: it is damaged or not channel-merged"
                )
            may_miss = may_miss_tokens(self.config) if module is self.get_output_embeddings() else None
            module.check_channel_index(path, may_miss)
            if isinstance(module, ChannelMergedLinear):
                module.derive()
        super()._initialize_missing_keys(is_quantized)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Let a recomputed block see the experts that were active when it first ran."""

        def checkpoint_with_experts(function, *args, **checkpoint_kwargs):
            active = active_or_none()

            def run(*args, **kwargs):
                with activate(active):
                    return function(*args, **kwargs)

            return gradient_checkpointing_func(run, *args, **checkpoint_kwargs)

        super()._set_gradient_checkpointing(enable, checkpoint_with_experts, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the vocabulary; each new token is one row that all experts own.

        Args:
            new_num_tokens: the new vocabulary size; None keeps it, up to `pad_to_multiple_of`.
            mean_resizing: new rows start at the mean of the stored rows, else from N(0, initializer_range).
        """
        self.check_whole("resized")
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == embedding.num_embeddings:
            return embedding
        std = None if mean_resizing else self.config.get_text_config().initializer_range
        for module in (embedding, head):
            if isinstance(module, ChannelIndexed):
                resize_channels(module, size, std)
        if head is not None and self.config.text_config.tie_word_embeddings:
            # The head does not read the row of tokens that an expert lacks, and so would number its rows otherwise.
            head.channel_index = embedding.channel_index.masked_fill(head.channel_index < 0, -1)
            head.rows.out_features = embedding.num_rows
            head.derive()
        for path, module in self.channel_modules().items():
            if module in (embedding, head):
                self.config.rows[path] = module.num_rows
        self.config.resize_vocabulary(size)
        self.tie_weights()
        return embedding


class ChannelMergedModel(ChannelMergedPreTrainedModel):
    """The base architecture without its head: hidden states of the expert that each query is routed to."""

    def _build_inner(self, inner: PreTrainedModel) -> PreTrainedModel:
        head = inner.get_output_embeddings()
        head_path = next(path for path, module in inner.named_modules() if module is head)
        inner = super()._build_inner(inner)
        inner.set_submodule(head_path, nn.Identity())
        inner._tied_weights_keys, inner.all_tied_weights_keys = {}, {}
        self._keys_to_ignore_on_load_unexpected = [rf"^model\.{head_path}\."]
        return inner

    def get_output_embeddings(self) -> None:
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        expert_index: ExpertIndex | None = None,
        router_only: bool = False,
        **kwargs,
    ) -> ChannelMergedModelOutput | RouterOutput:
        """Hidden states (B, T, H) of the expert of each row: `expert_index`, else the cache's, else the router's.

        `expert_index` of shape (B, T) names the expert of each token; see `ChannelMergedForCausalLM.forward`.
        """
        if router_only:
            return self._route(input_ids, attention_mask, inputs_embeds)
        experts, router_logits = self._experts_of_batch(
            input_ids, attention_mask, inputs_embeds, past_key_values, expert_index, position_ids
        )
        use_cache = experts.check_caches(past_key_values, use_cache)
        with activate(experts.active):
            outputs = self.model.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **({} if position_ids is None else {"position_ids": position_ids}),
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        remember_experts(outputs.past_key_values, experts)
        return ChannelMergedModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
            expert_index=experts.expert_index,
        )


class ChannelMergedForCausalLM(ChannelMergedPreTrainedModel, ExpertGenerationMixin):
    """N experts of one base causal language model, and the router that picks one per query.

    ```python
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    model.generate(**inputs)                        # routes each prompt by itself, a chat by the user's last turn
    model.generate(**inputs, expert_index="math")   # or an index, a list, or a LongTensor (B,)
    model.generate(**inputs, **model.router_inputs(tokenizer, messages))   # the same, from messages
    ```
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_index: ExpertIndex | None = None,
        router_only: bool = False,
        **kwargs,
    ) -> ChannelMergedCausalLMOutput | RouterOutput:
        """Logits of the expert of each row: `expert_index`, else the one that filled the cache, else the router's.

        Args:
            input_ids: (B, T); attention_mask: (B, T); the rest as in the base architecture.
            labels: (B, T) for the language-modelling loss. The choice of an expert has no gradient, so the router does
                not learn from it. Or (B,), the right experts: as `expert_labels`.
            expert_index: name, index, list of B of them, or (B,) int64 tensor. An int64 tensor (B, T) names the expert
                of each token, for rows in which several queries are packed, kept apart by `position_ids` that restart
                or by the mask; it goes without a cache, since a cache's row is one expert's.
            router_only: return the `RouterOutput` alone, of all that is given; `route` leaves of a chat what the
                router reads.
            expert_labels: (B,) int64 right experts, or their names: returns the router's cross-entropy and logits, and
                runs only the layers that the router needs.
        """
        # Not a named argument: the Trainer would take it for a second label, and only evaluate where both are given.
        expert_labels = kwargs.pop("expert_labels", None)
        if router_only:
            return self._route(input_ids, attention_mask, inputs_embeds)
        if labels is not None and expert_labels is not None:
            raise ValueError("give labels (language modelling) or expert_labels (router), not both")
        if labels is not None and labels.dim() == 1:
            expert_labels = labels
        if expert_labels is not None:
            router_logits = self.router_logits(*self._read_by_router(input_ids, attention_mask), inputs_embeds)
            loss = self.router_loss(router_logits, expert_labels, kwargs.get("num_items_in_batch"))
            return ChannelMergedCausalLMOutput(loss=loss, router_logits=router_logits)
        experts, router_logits = self._experts_of_batch(
            input_ids, attention_mask, inputs_embeds, past_key_values, expert_index, position_ids
        )
        use_cache = experts.check_caches(past_key_values, use_cache)
        capped = self._caps_missing_tokens()
        with activate(experts.active.keeping(logits_to_keep)):
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **({} if position_ids is None else {"position_ids": position_ids}),
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=None if capped else labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        remember_experts(outputs.past_key_values, experts)
        loss, logits = outputs.loss, outputs.logits
        if capped:
            index = self.get_output_embeddings().channel_index
            expert_index = experts.expert_index.to(index.device)
            is_packed = expert_index.dim() == 2
            expert_index = kept_tokens(expert_index, logits_to_keep) if is_packed else expert_index[:, None]
            missing = index[expert_index] < 0  # (B, 1 or tokens, V)
            logits = logits.masked_fill(missing.to(logits.device), float("-inf"))
            if labels is not None:
                loss = self.model.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return ChannelMergedCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
            expert_index=experts.expert_index,
        )

    def _supports_logits_to_keep(self) -> bool:
        """Continuous batching asks, so that only the tokens that are continued reach the head."""
        return True

    def _caps_missing_tokens(self) -> bool:
        """Whether the base architecture turns the -inf of a token that an expert does not have into a number."""
        capping = getattr(self.config.text_config, "final_logit_softcapping", None)
        return capping is not None and self.get_output_embeddings().derived.may_miss


__all__ = ["ChannelMergedModel", "ChannelMergedForCausalLM"]
