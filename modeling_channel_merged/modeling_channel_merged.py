"""Channel-merged causal language models: N experts of one base architecture in one set of weights, and their router.

The model wraps the base architecture unchanged: `self.model` is the base's own causal language model whose linear
maps, token embedding and norms were swapped for their N-expert forms. Each query is answered by one expert, picked by
the router from the features of the first blocks run as the trunk expert (Channel Merging, Zhang et al., arXiv
2412.15283).
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import can_return_tuple, logging

from .active_experts import ActiveExperts, activate, active_or_none
from .channel_merged_layers import (
    ChannelIndexed,
    ChannelMergedLinear,
    PerExpert,
    find_modules,
    resize_channels,
    swap_modules,
)
from .configuration_channel_merged import ChannelMergedConfig
from .expert_caches import BatchExperts, experts_of_cache, remember_experts
from .expert_router import ExpertRouter
from .generation_channel_merged import ExpertGenerationMixin
from .model_outputs import ChannelMergedCausalLMOutput, ChannelMergedModelOutput, RouterOutput
from .router_inputs import check_router_mask, shorten
from .stored_tensors import check_stored_tensors, may_miss_tokens

logger = logging.get_logger(__name__)

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

ExpertIndex = str | int | list[str | int] | torch.LongTensor


class _TrunkDone(Exception):
    """Leaves the forward pass once the router's features are there."""

    def __init__(self, hidden_states: torch.Tensor):
        self.hidden_states = hidden_states


def _stop_after_trunk(block: nn.Module, args: tuple, output):
    active = active_or_none()
    if active is not None and active.trunk_only:
        raise _TrunkDone(output[0] if isinstance(output, tuple) else output)


class ChannelMergedPreTrainedModel(PreTrainedModel):
    """Wraps a base architecture: building, loading, routing, and running it with the experts of a batch."""

    config_class = ChannelMergedConfig
    config: ChannelMergedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules = ["router"]
    _keep_in_fp32_modules_strict = ["router"]
    # Checkpoints leave it out until the router is trained; it starts at zero.
    _keys_to_ignore_on_load_missing = [r"^router\.ngrams\.weight$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in Transformers; tensor parallel plans, which would shard nothing of a channel-merged model, are refused.

        Raises:
            ValueError: `tp_plan`, `tp_size`, or a `distributed_config` with one of them.
        """
        distributed = kwargs.get("distributed_config")
        for name in ("tp_plan", "tp_size"):
            in_config = distributed.get(name) if isinstance(distributed, dict) else getattr(distributed, name, None)
            value = in_config if kwargs.get(name) is None else kwargs[name]
            if value is not None and value != 1:
                raise ValueError(
                    f"{name} is {value!r}, but channel-merged models do not run tensor parallel yet: leave it out, "
                    'split the model with device_map="auto", or export one expert'
                )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def __init__(self, config: ChannelMergedConfig):
        inner_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.text_config), None)
        if inner_class is None:
            raise ValueError(f"text_config.model_type {config.text_config.model_type!r} has no causal language model")
        for flag in MIRRORED_FLAGS:
            setattr(self, flag, getattr(inner_class, flag))
        super().__init__(config)
        self.model = self._build_inner(inner_class._from_config(config.text_config))
        settings = {key: config.router[key] for key in ("pooling", "features", "max_tokens")}
        self.router = ExpertRouter(config.hidden_size, config.num_experts, **settings)
        self.decoder_blocks()[config.router["layers"] - 1].register_forward_hook(_stop_after_trunk)
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
        if head is not None and self.config.tie_word_embeddings:
            # The head does not read the row of tokens that an expert lacks, and so would number its rows otherwise.
            head.channel_index = embedding.channel_index.masked_fill(head.channel_index < 0, -1)
            head.rows.out_features = embedding.num_rows
        for path, module in self.channel_modules().items():
            if module in (embedding, head):
                self.config.rows[path] = module.num_rows
        self.config.resize_vocabulary(size)
        self.tie_weights()
        return embedding

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
    ) -> RouterOutput:
        """Which expert should answer each query.

        Of a query longer than `config.router["max_tokens"]`, its first and last tokens are read. A query of padding
        only, or of no tokens, has zero logits and the default expert.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, H); `attention_mask` (B, T), padding on any side.
            top_k: also return this many most probable experts, at most N.

        Raises:
            ValueError: top_k is not a number from 1 to N, a mask that is not (B, T), or a query whose features are not
                finite.
        """
        num_experts = self.config.num_experts
        if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= num_experts):
            raise ValueError(f"top_k is {top_k!r}, expected 1 to {num_experts}, the number of experts")
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

    def router_logits(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.FloatTensor:
        """(B, N) float32 logits, running only the first `config.router["layers"]` blocks as the trunk expert."""
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
        weight = self.router.head.weight
        device = hidden_states.device if weight.is_meta else weight.device  # an offloaded router comes to its inputs
        input_ids = None if input_ids is None else input_ids.to(device)
        return self.router.features(hidden_states.to(device), attention_mask.to(device), input_ids)

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
        """(B, N) logits -> (B,) experts; the default expert while untrained or less sure than the threshold."""
        default = self.config.expert_id(self.config.router["default_expert"])
        if not self.router.is_trained:
            logger.warning_once(
                "The router of this model is untrained: every query is answered by "
                f"{self.config.expert_names[default]!r}. "
                "Train it with `channel-merge train-router`, or name an expert with `expert_index`."
            )
            return torch.full_like(router_logits[:, 0], default, dtype=torch.int64)
        probabilities = self.router_probabilities(router_logits)
        experts = probabilities.argmax(-1)  # the first of equals
        return experts.where(probabilities.amax(-1) >= self.config.router["threshold"], default)

    def _route(self, input_ids, attention_mask, inputs_embeds) -> RouterOutput:
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs.shape[1] == 0:
            logits = torch.zeros(len(inputs), self.config.num_experts, device=inputs.device)
        else:
            logits = self.router_logits(input_ids, attention_mask, inputs_embeds)
        if attention_mask is None:
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
        default = self.config.expert_id(self.config.router["default_expert"])
        expert_index = self.choose_experts(logits).where(has_tokens, default)
        return RouterOutput(logits=logits, expert_index=expert_index, probabilities=self.router_probabilities(logits))

    def _experts_of_batch(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.FloatTensor | None,
        past_key_values: Cache | None,
        expert_index: ExpertIndex | None,
    ) -> tuple[BatchExperts, torch.FloatTensor | None]:
        """Experts of a batch: those given, else those that filled the cache, else the router's, and then its logits.

        A filled cache keeps the experts that filled it; another expert's keys and values would be wrong silently.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        cached, router_logits = experts_of_cache(past_key_values), None
        if expert_index is not None and torch.compiler.is_dynamo_compiling():
            experts, cached = self._experts_in_graph(inputs, expert_index), None
        elif cached is not None and (expert_index is None or cached.came_from(expert_index)):
            experts = cached
        elif expert_index is not None:
            given = expert_index if isinstance(expert_index, torch.Tensor) else None
            experts = BatchExperts.of_rows(self._expert_rows(expert_index, len(inputs)), inputs.device, given)
        else:
            routing = self._route(input_ids, attention_mask, inputs_embeds)
            experts = BatchExperts.of_rows(routing.expert_index.tolist(), inputs.device, routing.expert_index)
            router_logits = routing.logits
        if cached is not None:
            experts = self._of_filled_cache(experts, cached, len(inputs))
        return experts, router_logits

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
        """Hidden states (B, T, H) of the expert of each row: `expert_index`, else the cache's, else the router's."""
        if router_only:
            return self._route(input_ids, attention_mask, inputs_embeds)
        experts, router_logits = self._experts_of_batch(
            input_ids, attention_mask, inputs_embeds, past_key_values, expert_index
        )
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
    model.generate(**inputs)                        # routes each prompt by itself
    model.generate(**inputs, expert_index="math")   # or an index, a list, or a LongTensor (B,)
    model.generate(**inputs, **model.router_inputs(tokenizer, messages))   # routes by the last turn of the user
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
            expert_index: name, index, list of B of them, or (B,) int64 tensor.
            router_only: return the `RouterOutput` alone.
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
            router_logits = self.router_logits(input_ids, attention_mask, inputs_embeds)
            loss = self.router_loss(router_logits, expert_labels, kwargs.get("num_items_in_batch"))
            return ChannelMergedCausalLMOutput(loss=loss, router_logits=router_logits)
        experts, router_logits = self._experts_of_batch(
            input_ids, attention_mask, inputs_embeds, past_key_values, expert_index
        )
        capped = self._caps_missing_tokens()
        with activate(experts.active):
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
            missing = index[experts.expert_index.to(index.device)] < 0  # (B, V)
            logits = logits.masked_fill(missing[:, None].to(logits.device), float("-inf"))
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

    def _caps_missing_tokens(self) -> bool:
        """Whether the base architecture turns the -inf of a token that an expert does not have into a number."""
        capping = getattr(self.config.text_config, "final_logit_softcapping", None)
        return capping is not None and self.get_output_embeddings().derived.may_miss


__all__ = ["ChannelMergedModel", "ChannelMergedForCausalLM"]
