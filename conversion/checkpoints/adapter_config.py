"""What adapter_config.json of a LoRA adapter says, checked setting by setting."""

import logging
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion.io.foreign_files import foreign, read_json
from conversion.io.sources import ADAPTER_CONFIG, Source

logger = logging.getLogger(__name__)

# Settings of an adapter of an expert of a merged model: the expert, its hash, and the modules that are adapted. What
# PEFT calls target_modules says there how to load it, for PEFT alone knows no experts and shows what it does not find.
MERGED_EXPERT, EXPERT_HASH, EXPERT_MODULES = "merged_expert", "merged_expert_hash", "merged_target_modules"
HOW_TO_LOAD = (
    "this is a LoRA of one expert of a channel-merged model: load it with "
    "conversion.expert_lora.adapt_expert(model, FOLDER), not with PEFT alone"
)

# Settings that are read here, or that change nothing once the adapter is trained. Any other must be PEFT's default.
MERGEABLE_SETTINGS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_bias lora_dropout lora_ga_config merged_expert merged_expert_hash merged_target_modules modules_to_save
    peft_version r rank_pattern revision target_modules task_type trainable_token_indices use_dora use_rslora
    """.split()
)
# Initialisations that leave the base's weights as they are; pissa, olora, corda, loftq and others do not.
KNOWN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about the values of the adapted weights."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    base_model: str | None
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, list[int]] | list[int] | None  # by module, or the embedding's
    merged_expert: str | None = None  # the expert of a merged model that was adapted, and not the base
    merged_expert_hash: str | None = None  # of that expert, where it was known

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens_of(self, module: str) -> list[int] | None:
        """Ids of the trained tokens of a module; None where it has none."""
        if not isinstance(self.token_indices, Mapping):
            return self.token_indices
        return next((ids for name, ids in self.token_indices.items() if self.names(name, module)), None)

    @staticmethod
    def names(name: str, module: str) -> bool:
        """Whether a name in the config is of the module with this path: the path or an end of it."""
        return module == name or module.endswith(f".{name}")

    def check_of_base(self, source: Source) -> None:
        """ValueError where an expert of a merged model was adapted."""
        if self.merged_expert is not None:
            raise ValueError(
                f"{source.name}: {source.model} adapts the expert {self.merged_expert!r} of a channel-merged "
                "checkpoint and not a base model: fold it into that checkpoint with channel-merge add-expert"
            )


def read_adapter_config(source: Source) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        ValueError: it cannot be read, is no LoRA, or has a setting that is not supported; by name.
    """
    with foreign(f"{source.name}: {ADAPTER_CONFIG} of {source.model} cannot be read"):
        values = read_json(source.folder / ADAPTER_CONFIG)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{source.name}: {source.model} is a PEFT adapter of type {str(kind)[:80]}, only LORA can be merged"
        )
    for key in sorted(changed_settings(values).keys() - MERGEABLE_SETTINGS):
        if values[key]:  # what is empty asks for nothing
            raise ValueError(f"{source.name}: {source.model} sets {key} to {values[key]!r}, which is not supported")
    initialisation = values.get("init_lora_weights")
    if initialisation not in KNOWN_INITIALISATIONS:
        raise ValueError(
            f"{source.name}: {source.model} was trained with init_lora_weights {initialisation!r}, which changes the "
            "base's weights: save it as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    for key in ("base_model_name_or_path", MERGED_EXPERT, EXPERT_HASH):
        if not isinstance(values.get(key), str | None):
            raise ValueError(
                f"{source.name}: {ADAPTER_CONFIG} of {source.model}: {key} is {reprlib.repr(values[key])}, "
                "expected a name"
            )
    try:
        ranks = {key: int(rank) for key, rank in (values.get("rank_pattern") or {}).items()}
        alphas = {key: float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()}
        if min((int(values["r"]), *ranks.values())) < 1:
            raise ValueError("a rank is at least 1")
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
        return AdapterConfig(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            base_model=values.get("base_model_name_or_path"),
            modules_to_save=tuple(values.get("modules_to_save") or ()),
            token_indices=values.get("trainable_token_indices"),
            merged_expert=values.get(MERGED_EXPERT),
            merged_expert_hash=values.get(EXPERT_HASH),
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error):
        keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        shown = ", ".join(f"{key} {reprlib.repr(values.get(key))}" for key in keys)
        raise ValueError(
            f"{source.name}: {ADAPTER_CONFIG} of {source.model} must have numbers r (at least 1) and lora_alpha, "
            f"and patterns with numbers, got {shown}"
        ) from None


def changed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the settings of a LoRA that differ from PEFT's default -> the default; None of what PEFT does not know.

    Args:
        values: settings by name, as adapter_config.json or `dataclasses.asdict` has them.
    """
    from peft import LoraConfig  # slow to import, and most commands read no adapter

    defaults = asdict(LoraConfig())
    return {name: defaults.get(name) for name, value in values.items() if value != defaults.get(name)}


def check_adapted_expert(
    adapter: str | Path, expert: str, made_for: str | None, found: str | None, model: str
) -> None:
    """ValueError where the expert that an adapter was made for is another one than that of the model.

    Args:
        made_for: hash of the expert when the adapter was made, or None: not known.
        found: hash of the model's expert, or None: not known.
    """
    if made_for is not None and found is not None and made_for != found:
        raise ValueError(
            f"{adapter} was made for an expert {expert!r} with the hash {made_for:.12}, expected {found:.12}, that of "
            f"{model}: give the checkpoint that it was trained on"
        )


def compare_base_names(config: AdapterConfig, source: Source, base: Source) -> None:
    """Warn of an adapter that was trained on a model of another name. A folder counts by its last part.

    A hash tells more than a name, see `check_adapted_expert`.
    """
    if not config.base_model or config.merged_expert_hash is not None:
        return
    theirs, ours = (Path(name).name.lower() for name in (config.base_model, base.repository))
    if theirs != ours:
        logger.warning(
            "expert %r is an adapter of %s, here it is put on %s: make sure that they are the same model",
            source.name,
            config.base_model,
            base.model,
        )


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's path, or an end of it, matches; PEFT's rule."""
    from peft.utils.other import get_pattern_key  # slow to import, and most commands read no adapter

    return patterns.get(get_pattern_key(patterns.keys(), module), default)
