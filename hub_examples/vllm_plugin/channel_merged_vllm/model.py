"""Channel-merged causal language models in vLLM: its attention and caches, our rows, one expert for each token.

A request names its expert as it names a LoRA adapter. The adapters of `channel-merged-selectors` have rank 1 and one
target, `expert_selector`, a layer of zeros: with the adapter of expert `e` it gives `e + 1` for each of the request's
tokens, and without one 0, which stands for the checkpoint's default expert. So vLLM keeps what it knows of adapters:
which may share a batch, and whose blocks of the prefix cache are whose.

vLLM's packed tokens are to the channel-merged layers a batch of rows of one token each.
"""

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from channel_merged_vllm.selectors import SELECTOR, SELECTOR_SIZE
from channel_merged_vllm.stored_rows import ExpertNorm, RankEmbedding, RankLinear, gather_logits
from modeling_channel_merged.active_experts import ActiveExperts, activate
from modeling_channel_merged.stored_tensors import check_index_values, may_miss_tokens

BASES = ("llama", "mistral", "qwen2", "qwen3")
STORED_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<index>channel_index)|rows\.(?P<tensor>weight|bias)|experts\.(?P<expert>\d+)\.weight)"
)


def check_engine(vllm_config: VllmConfig):
    """Raise ValueError for a checkpoint or options of vLLM that cannot be served, before memory is taken."""
    config = vllm_config.model_config.hf_config
    text_config, experts = config.text_config, config.num_experts
    if text_config.model_type not in BASES:
        raise ValueError(
            f"text_config.model_type is {text_config.model_type!r}, but the vLLM plugin serves the bases "
            f"{', '.join(BASES)}: serve this checkpoint by `channel-merge serve`, or export one expert"
        )
    if text_config.hidden_act != "silu":
        raise ValueError(f"text_config.hidden_act is {text_config.hidden_act!r}, expected 'silu'")
    if vllm_config.quant_config is not None:
        raise ValueError(
            f"quantization is {vllm_config.model_config.quantization!r}, but the vLLM plugin serves float rows only"
        )
    model_config = vllm_config.model_config
    for option, is_set in (
        ("--runner", model_config.runner_type != "generate"),
        ("--enable-prompt-embeds", model_config.enable_prompt_embeds),
        ("--speculative-config", vllm_config.speculative_config is not None),
    ):
        if is_set:
            raise ValueError(f"{option} is set, but the vLLM plugin only generates, from token ids: leave it out")
    lora = vllm_config.lora_config
    if lora is None:
        raise ValueError(
            f"experts are named by LoRA adapters: start vLLM with --enable-lora --max-loras {experts} and the "
            "--lora-modules that channel-merged-selectors prints"
        )
    if lora.max_loras < experts:
        raise ValueError(
            f"max_loras is {lora.max_loras}, expected at least {experts}, the number of experts: with fewer, requests "
            f"to others wait for the whole batch to end. Start vLLM with --max-loras {experts}"
        )
    if lora.target_modules is not None and SELECTOR not in lora.target_modules:
        raise ValueError(f"lora_target_modules is {lora.target_modules}, expected {SELECTOR!r} in it, or none")


class Builder:
    """Makes the modules of one rank: what it holds of each, by the module's path in the base architecture."""

    def __init__(self, vllm_config: VllmConfig):
        self.config = vllm_config.model_config.hf_config
        self.text_config = self.config.text_config
        self.vllm_config = vllm_config
        self.rank, self.size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def part(self, count: int) -> slice:
        """This rank's own of `count` equal things; vLLM refuses heads that cannot be shared out evenly."""
        if count % self.size:
            raise ValueError(f"tensor_parallel_size is {self.size}, expected a divisor of {count}")
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def vocabulary_part(self) -> slice:
        """This rank's own tokens: equally many for each, so that the last rank's may end beyond the vocabulary."""
        step = -(-self.text_config.vocab_size // self.size)
        return slice(self.rank * step, (self.rank + 1) * step)

    def linear(self, path: str, in_features: int, out_features: int, **options) -> RankLinear:
        num_rows = self.config.rows.get(path, out_features)
        return RankLinear(in_features, out_features, num_rows, self.config.num_experts, **options)

    def adding_linear(self, path: str, in_features: int, out_features: int, inputs: slice, bias: bool) -> RankLinear:
        return self.linear(
            path,
            in_features,
            out_features,
            bias=bias,
            inputs=inputs,
            adds_up=self.size > 1,
            holds_bias=self.rank == 0,
        )

    def norm(self, size: int) -> ExpertNorm:
        return ExpertNorm(self.config.num_experts, size, self.text_config.rms_norm_eps)


class MergedAttention(nn.Module):
    def __init__(self, build: Builder, layer: int, path: str):
        super().__init__()
        config, hidden_size = build.text_config, build.text_config.hidden_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // heads
        if max(kv_heads, build.size) % min(kv_heads, build.size):
            raise ValueError(f"tensor_parallel_size is {build.size}, expected a divisor or multiple of {kv_heads}")
        own = build.part(heads)
        # Each key-value head is on as many ranks as have one of its queries.
        shared = heads // kv_heads
        own_kv = slice(own.start // shared, -(-own.stop // shared))
        self.num_heads, self.num_kv_heads = own.stop - own.start, own_kv.stop - own_kv.start
        biases = config.model_type == "qwen2" or getattr(config, "attention_bias", False)

        def projection(name: str, count: int, part: slice) -> RankLinear:
            channels = slice(part.start * self.head_dim, part.stop * self.head_dim)
            return build.linear(f"{path}.{name}", hidden_size, count * self.head_dim, bias=biases, channels=channels)

        self.q_proj = projection("q_proj", heads, own)
        self.k_proj = projection("k_proj", kv_heads, own_kv)
        self.v_proj = projection("v_proj", kv_heads, own_kv)
        inputs = slice(own.start * self.head_dim, own.stop * self.head_dim)
        self.o_proj = build.adding_linear(
            f"{path}.o_proj", heads * self.head_dim, hidden_size, inputs, getattr(config, "attention_bias", False)
        )
        has_norms = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (build.norm(self.head_dim) if has_norms else nn.Identity() for _ in range(2))
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        layer_types = getattr(config, "layer_types", None)
        slides = layer_types is None or layer_types[layer] == "sliding_attention"
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=build.vllm_config.cache_config,
            per_layer_sliding_window=getattr(config, "sliding_window", None) if slides else None,
            prefix=f"{path}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).flatten(1)
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).flatten(1)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, self.v_proj(hidden_states)))


class MergedMLP(nn.Module):
    def __init__(self, build: Builder, path: str):
        super().__init__()
        hidden_size, size = build.text_config.hidden_size, build.text_config.intermediate_size
        own, bias = build.part(size), getattr(build.text_config, "mlp_bias", False)
        self.gate_proj = build.linear(f"{path}.gate_proj", hidden_size, size, bias=bias, channels=own)
        self.up_proj = build.linear(f"{path}.up_proj", hidden_size, size, bias=bias, channels=own)
        self.down_proj = build.adding_linear(f"{path}.down_proj", size, hidden_size, own, bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MergedBlock(nn.Module):
    def __init__(self, build: Builder, layer: int):
        super().__init__()
        path = f"model.layers.{layer}"
        self.self_attn = MergedAttention(build, layer, f"{path}.self_attn")
        self.mlp = MergedMLP(build, f"{path}.mlp")
        self.input_layernorm = build.norm(build.text_config.hidden_size)
        self.post_attention_layernorm = build.norm(build.text_config.hidden_size)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(positions, self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MergedDecoder(nn.Module):
    def __init__(self, build: Builder):
        super().__init__()
        config = build.text_config
        sizes = config.vocab_size, config.hidden_size
        num_rows = build.config.rows.get("model.embed_tokens", config.vocab_size)
        whole = slice(0, config.vocab_size)
        tokens = whole if build.size == 1 else build.vocabulary_part()
        self.embed_tokens = RankEmbedding(*sizes, num_rows, build.config.num_experts, tokens)
        self.layers = nn.ModuleList([MergedBlock(build, layer) for layer in range(config.num_hidden_layers)])
        self.norm = build.norm(config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for block in self.layers:
            hidden_states = block(positions, hidden_states)
        return self.norm(hidden_states)


class MergedLanguageModel(nn.Module):
    """The decoder and its head, whose modules have the names that they have in the base architecture."""

    def __init__(self, build: Builder):
        super().__init__()
        config = build.text_config
        self.model = MergedDecoder(build)
        tied = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        num_rows = build.config.rows.get(tied, config.vocab_size)
        channels = slice(None) if build.size == 1 else build.vocabulary_part()
        self.lm_head = RankLinear(
            config.hidden_size, config.vocab_size, num_rows, build.config.num_experts, channels=channels
        )


class ChannelMergedForCausalLM(nn.Module, SupportsLoRA):
    """N experts of one base causal language model; each token's expert is what its request's adapter says."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_engine(vllm_config)
        build = Builder(vllm_config)
        self.config, self.ranks = build.config, build.size
        self.model = MergedLanguageModel(build)
        self.expert_selector = ReplicatedLinear(
            SELECTOR_SIZE, SELECTOR_SIZE, bias=False, return_bias=False, prefix=SELECTOR
        )
        nn.init.zeros_(self.expert_selector.weight)
        default = self.config.expert_id(self.config.router["default_expert"])
        experts = torch.tensor([default, *range(self.config.num_experts)])
        self.register_buffer("expert_of_number", experts.to(self.expert_selector.weight.device), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("each expert has its own embeddings: give token ids, not embeddings")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T,) token ids -> (T, H + 1): hidden states, and beside them each token's expert for `compute_logits`."""
        experts = self.experts_of_tokens(len(positions))
        with activate(active_tokens(experts)):
            hidden_states = self.model.model(input_ids, positions)
        return torch.cat([hidden_states, experts[:, None].to(hidden_states.dtype)], dim=-1)

    def experts_of_tokens(self, count: int) -> torch.LongTensor:
        """(T,) the expert of each of the batch's `count` tokens."""
        weight = self.expert_selector.weight
        numbers = self.expert_selector(weight.new_ones(count, SELECTOR_SIZE))[:, 0].round().long()
        if current_platform.is_cpu():  # where vLLM takes "no adapter", -1, for the last one
            numbers = numbers.masked_fill(self.expert_selector.punica_wrapper.token_lora_indices < 0, 0)
        return self.expert_of_number[numbers.clamp(0, self.config.num_experts)]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(S, H + 1) of the sampled tokens -> (S, V); -inf for a token that the expert's vocabulary does not have."""
        experts = hidden_states[:, -1].long().clamp(0, self.config.num_experts - 1)
        with activate(active_tokens(experts)):
            logits = self.model.lm_head(hidden_states[:, :-1].contiguous())
        return gather_logits(logits, self.config.vocab_size, self.ranks)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Give each module what this rank holds of the stored tensors; a module is filled once all of its are there.

        Raises:
            ValueError: a tensor of no module, a module without its tensors, or an index that names no stored row.
        """
        modules = dict(self.named_modules())
        holders = {path: modules[path] for path in modules if isinstance(modules[path], RankLinear | RankEmbedding)}
        parts = {path: stored_parts(module) for path, module in holders.items()}
        tied_head = None
        if self.config.tie_word_embeddings:
            tied_head = self.model.lm_head
            parts["model.model.embed_tokens"]["head_index"] = parts.pop("model.lm_head")["channel_index"]
        experts = range(self.config.num_experts)
        norms = {path: set(experts) for path in modules if isinstance(modules[path], ExpertNorm)}
        read: dict[str, dict[str, torch.Tensor]] = {path: {} for path in parts}
        for name, tensor in weights:
            if name.startswith("router."):
                continue
            match = STORED_TENSOR.fullmatch(name)
            path, part = (match["module"], match["index"] or match["tensor"]) if match else (None, None)
            if match and match["expert"] and int(match["expert"]) in norms.get(path, ()):
                modules[path].weight[int(match["expert"])].copy_(tensor)
                norms[path].remove(int(match["expert"]))
                continue
            if tied_head is not None and name == "model.lm_head.channel_index":
                path, part = "model.model.embed_tokens", "head_index"
            if path not in read or part not in parts[path]:
                raise ValueError(f"{name} is of no module of the model: the checkpoint is damaged")
            if tensor.shape != parts[path][part]:
                shapes = f"the shape {tuple(tensor.shape)}, expected {tuple(parts[path][part])}"
                raise ValueError(f"{name} has {shapes}: the checkpoint is damaged")
            if match["index"]:
                may_miss = may_miss_tokens(self.config) if match["module"] == "model.lm_head" else None
                check_index_values(match["module"], tensor, holders[path].num_rows, may_miss)
            read[path][part] = tensor
            if read[path].keys() == parts[path].keys():
                options = {"tied_head": tied_head} if path == "model.model.embed_tokens" else {}
                holders[path].fill(read.pop(path), self.expert_selector.weight, **options)
        missing = sorted([*read, *(path for path, left in norms.items() if left)])
        if missing:
            raise ValueError(f"the checkpoint lacks tensors of {missing[0]}: it is damaged")
        return {name for name, _ in self.named_parameters()}


def stored_parts(module: RankLinear | RankEmbedding) -> dict[str, torch.Size]:
    """The stored tensors of a module that is not filled yet, and their shapes."""
    shapes = {name: parameter.shape for name, parameter in module.rows.named_parameters()}
    return shapes | {"channel_index": module.channel_index.shape}


def active_tokens(experts: torch.LongTensor) -> ActiveExperts:
    """The experts of a packed batch, (T,), which are read to the host but where a CUDA graph is captured."""
    if experts.is_cuda and torch.cuda.is_current_stream_capturing():
        return ActiveExperts.mixed(experts)
    return ActiveExperts.from_index(experts)
