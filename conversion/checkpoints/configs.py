"""The configs of plain checkpoints: read without running their code, and compared with the base's."""

import copy
import logging
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from conversion.checkpoints.lora_patches import saved_rows
from conversion.io.foreign_files import foreign, read_model_config
from conversion.io.model_files import drop_code_references
from conversion.io.sources import Source

logger = logging.getLogger(__name__)

# Config fields that no output of the model depends on. Every other field must be the base's, also one unknown here.
FREE_CONFIG_FIELDS = frozenset(
    """
    _name_or_path name_or_path architectures auto_map quantization_config dtype torch_dtype transformers_version
    model_max_length
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id tokenizer_class prefix task_specific_params chunk_size_feed_forward
    use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob classifier_dropout
    attention_probs_dropout_prob summary_first_dropout embedding_dropout residual_dropout attn_dropout dropout
    initializer_range initializer_factor id2label label2id num_labels problem_type finetuning_task
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens num_return_sequences remove_invalid_values
    exponential_decay_length_penalty max_new_tokens
    _attn_implementation _attn_implementation_internal attn_implementation _flash_attn_2_enabled neftune_noise_alpha
    gradient_checkpointing pretraining_tp unsloth_version unsloth_fixed use_mistral_transformers_template
    """.split()
)


# How many feed-forward networks a mixture of experts has, under its families' names.
MIXTURE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def load_config(source: Source) -> PreTrainedConfig:
    """The config of one checkpoint; refuses quantized and multimodal ones."""
    if source.is_adapter:
        raise ValueError(f"{source.name}: {source.model} is a PEFT adapter, expected a whole model")
    unreadable = f"{source.name}: the config of {source.model} cannot be read"
    with foreign(unreadable):
        values = read_model_config(source.folder / "config.json")
    if (quantization := values.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = method or "unknown method"
        raise ValueError(f"{source.name}: {source.model} is quantized ({method}), expected float weights")
    with foreign(unreadable):
        family = values["model_type"]
        if "auto_map" in values and family not in CONFIG_MAPPING:
            raise ValueError(f"its architecture {family!r} is code of its own (auto_map), which is never run here")
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    drop_code_references(config)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{source.name}: {source.model} ({config.model_type}) nests its language model in a larger one, "
            "which is not supported; save the language model alone"
        )
    check_family(source.name, config)
    return config


def adapted_config(expert: Source, base_config: PreTrainedConfig, inner: PreTrainedModel) -> PreTrainedConfig:
    """The config of the model that an adapter makes of its base: the base's, with the adapter's embedding's size.

    Args:
        expert: the adapter, its weights at hand.
        base_config: the base's.
        inner: the base architecture on the meta device, with a vocabulary of any size.
    """
    embedding = next(path for path, module in inner.named_modules() if module is inner.get_input_embeddings())
    size = saved_rows(expert, inner, f"{embedding}.weight")
    config = copy.deepcopy(base_config)
    config.vocab_size = base_config.vocab_size if size is None else size
    return config


def check_family(name: str, config: PreTrainedConfig) -> None:
    """Refuse by name what is no dense decoder-only language model."""
    family = f"{name}: {config.model_type}"
    if config.is_encoder_decoder:
        raise ValueError(f"{family} is an encoder-decoder, expected a decoder-only causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{family} has no causal language model in Transformers")
    for field in MIXTURE_FIELDS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"{family} is a mixture of experts ({field} is {count}), which is not supported: "
                "expected a dense causal language model"
            )


def compare_configs(base: PreTrainedConfig, expert: PreTrainedConfig, name: str) -> None:
    """Refuse an expert that computes differently from the base, by field name and both values."""
    if expert.model_type != base.model_type:
        raise ValueError(f"expert {name!r} is a {expert.model_type!r} model, the base is {base.model_type!r}")
    base_fields, expert_fields = base.to_dict(), expert.to_dict()
    absent = object()
    for field in sorted(base_fields.keys() | expert_fields.keys()):
        ours, theirs = base_fields.get(field, absent), expert_fields.get(field, absent)
        if field in FREE_CONFIG_FIELDS or field == "vocab_size" or ours == theirs:
            continue
        shown = ["nothing" if value is absent else repr(value) for value in (theirs, ours)]
        message = f"expert {name!r} has {field} {shown[0]}, the base has {shown[1]}"
        if field == "max_position_embeddings" and _positions_are_unbounded(base_fields):
            logger.warning("%s; the base's value is kept", message)
            continue
        raise ValueError(f"{message}: they would compute differently")


def _positions_are_unbounded(fields: dict[str, Any]) -> bool:
    """Whether the number of positions bounds nothing but the cache: plain rotary positions."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return False
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    return all(value.get("rope_type", "default") == "default" for value in per_layer_type or [rope])
