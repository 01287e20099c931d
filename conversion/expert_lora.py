"""Fine-tuning one expert inside a merged model, with PEFT's LoRA.

    from peft import LoraConfig
    model = AutoModelForCausalLM.from_pretrained("merged", trust_remote_code=True)
    peft_model = adapt_expert(model, "math", LoraConfig(r=16, lora_alpha=32))
    ...                                                    # Trainer, or any loop: an ordinary PeftModel
    peft_model.save_pretrained("math-lora")

    peft_model = adapt_expert(model, "math-lora")          # once more, in a fresh process
    channel-merge add-expert merged math-lora fixed --name math --replace

Stored rows are shared: a LoRA of `<module>.rows`, which PEFT would make of "all-linear", changes every expert that
reads them. The LoRA made here is one of an expert's channels, as if the expert were a model of its own, and is added
only to the batch rows that this expert runs: in memory no other expert changes, and `add-expert` gives the expert rows
of its own where the adapter made them differ.

Shapes: B batch, O channels, I inputs, r rank.
"""

import logging
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from conversion.checkpoints.adapter_config import (
    EXPERT_HASH,
    EXPERT_MODULES,
    HOW_TO_LOAD,
    MERGED_EXPERT,
    changed_settings,
    check_adapted_expert,
)
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.checkpoints.stored_expert import StoredExpertReader
from conversion.io.foreign_files import foreign, read_json
from conversion.io.sources import ADAPTER_CONFIG

logger = logging.getLogger(__name__)

TASK_TYPE = "CAUSAL_LM"
ALL_LINEAR = "all-linear"

# Settings of a LoRA that may differ from PEFT's default. Any other one would train parameters that experts share, or
# reads the weights that it adapts, which are no plain matrix here.
FREE_SETTINGS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path exclude_modules inference_mode init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_dropout merged_expert merged_expert_hash peft_version r rank_pattern revision
    target_modules task_type use_rslora
    """.split()
)
INITIALISATIONS = (True, False, "gaussian")


@dataclass
class ExpertLoraConfig(LoraConfig):
    """LoRA of one expert of a merged model; `adapt_expert` makes it.

    Args:
        merged_expert: the expert's name.
        merged_expert_hash: `StoredExpertReader.hash` of the expert as it was, or None: not known.
    """

    merged_expert: str | None = None
    merged_expert_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved."""
        values = super().to_dict()
        return {**values, EXPERT_MODULES: values["target_modules"], "target_modules": [HOW_TO_LOAD]}

    def bind(self, model: nn.Module):
        """Let PEFT make an `ExpertLora` of the linear maps of this model."""
        self.expert_index = model.config.expert_id(self.merged_expert)
        # The model's class may be this package's, or that of the code beside its weights.
        classes = {type(module) for module in model.modules() if is_merged_linear(module)}
        self._register_custom_module(dict.fromkeys(classes, ExpertLora))


class ExpertLora(LoraLinear):
    """LoRA of a `ChannelMergedLinear` in its channels, added to the batch rows of one expert.

    Tensors: lora_A (r, I), lora_B (O, r), as of the plain model that the expert's export is.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs):
        """Part of adding an adapter: it must be one of an expert."""
        if not isinstance(config, ExpertLoraConfig):
            raise ValueError(f"adapter {adapter_name!r} is no LoRA of an expert: add it with adapt_expert")
        self._experts = {**getattr(self, "_experts", {}), adapter_name: config.expert_index}
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, *args, **kwargs):
        raise ValueError(
            "a LoRA of one expert cannot be merged into rows that experts share: save it, and fold it into the "
            "checkpoint with `channel-merge add-expert CHECKPOINT ADAPTER OUT --name NAME --replace`"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, *, I) or flattened (B * T, I) -> the same leading dimensions with O channels."""
        output = self.base_layer(hidden_states)
        if self.disable_adapters:
            return output
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                output = self._add(adapter, hidden_states, output)
        return output

    def _add(self, adapter: str, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output` with one adapter's part, where its expert runs."""
        layers = sys.modules[type(self.get_base_layer()).__module__]
        active, expert = layers.active_experts(), self._experts[adapter]
        if active.expert is not None and active.expert != expert:
            return output
        inputs = self._cast_input_dtype(hidden_states, self.lora_A[adapter].weight.dtype)
        delta = self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](inputs))) * self.scaling[adapter]
        if active.expert is None:
            runs = (active.expert_index == expert).to(delta.device)  # (B,), or (B * T,) of a packed batch
            delta = layers.split_batch(lambda rows, _: rows * runs.view(-1, *[1] * (rows.dim() - 1)), delta, active)
        return (output + delta).to(output.dtype)


def adapt_expert(model: nn.Module, expert: str | Path, adapter: LoraConfig | str | Path | None = None) -> PeftModel:
    """An ordinary PeftModel that trains one expert of a merged model; its other experts stay as they are.

    A call of its `forward` that names no `expert_index` runs this expert; `generate` routes as ever.

    Args:
        model: `ChannelMergedForCausalLM`. PEFT changes it in place.
        expert: name of the expert; or, alone, the folder of an adapter that was made here and knows its expert.
        adapter: rank, alpha, dropout, target modules and so on; or the folder of an adapter of this expert, to run it
            or to go on with it. By default all linear maps of the decoder blocks are adapted.

    Raises:
        ValueError: no such expert, a setting that would reach what experts share, a target that is no linear map of
            the decoder blocks, or an adapter of another expert, or of this one in another checkpoint.
    """
    if getattr(model.config, "model_type", None) != "channel_merged":
        raise ValueError(f"{type(model).__name__} is no channel-merged model: give PEFT's get_peft_model any other")
    folder, config = None, adapter
    if not isinstance(adapter, LoraConfig):
        folder = Path(expert if adapter is None else adapter)
        if adapter is None and not folder.is_dir() and expert in model.config.expert_names:
            raise ValueError(f"{expert!r} is an expert: give a LoraConfig for it as well, or a folder with an adapter")
        config = read_lora_config(folder, None if adapter is None else expert)
        expert = config.merged_expert
    model.config.expert_id(expert)
    check_settings(config)
    expert_hash = hash_in_files(model, expert)
    if folder is not None:
        check_same_expert(folder, config, expert_hash, model)
        expert_hash = expert_hash or config.merged_expert_hash
    values = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    values |= {"task_type": TASK_TYPE, "target_modules": values["target_modules"] or ALL_LINEAR}
    values["inference_mode"] = False  # a saved adapter says the opposite, and would not train
    values["base_model_name_or_path"] = None  # PEFT writes down where the model is now
    if values["target_modules"] == ALL_LINEAR:
        values["target_modules"] = sorted({path.rpartition(".")[2] for path in block_linears(model)})
    config = ExpertLoraConfig(**values, **{MERGED_EXPERT: expert, EXPERT_HASH: expert_hash})
    check_targets(model, config)
    config.bind(model)
    peft_model = get_peft_model(model, config)
    # PEFT calls the merged model's `forward` itself, so this hook is on the layer between.
    peft_model.base_model.register_forward_pre_hook(_run_adapted_expert, with_kwargs=True)
    if folder is not None:
        peft_model.load_adapter(str(folder), "default", is_trainable=True)
    return peft_model


def read_lora_config(folder: Path, expert: str | None) -> ExpertLoraConfig:
    """The settings of an adapter of this expert; None: of whichever it names."""
    with foreign(f"{ADAPTER_CONFIG} of {folder} cannot be read"):
        values = read_json(folder / ADAPTER_CONFIG)
    adapted = values.get(MERGED_EXPERT)
    if not isinstance(adapted, str) or expert not in (None, adapted):
        whose = "a base model" if adapted is None else f"the expert {adapted!r}"
        expected = "an expert of a channel-merged model" if expert is None else f"the expert {expert!r}"
        raise ValueError(f"{folder} is an adapter of {whose}, expected one of {expected}")
    values["target_modules"] = values.get(EXPERT_MODULES, values.get("target_modules"))
    known = {field.name for field in fields(ExpertLoraConfig) if field.init}
    with foreign(f"{ADAPTER_CONFIG} of {folder}"):
        return ExpertLoraConfig(**{key: value for key, value in values.items() if key in known})


def hash_in_files(model: nn.Module, expert: str) -> str | None:
    """Hash of an expert in the files that the model was loaded from; None where they are gone, or quantized."""
    place, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not place:
        return None
    try:
        with MergedCheckpoint(place if commit is None else f"{place}@{commit}") as merged:
            return StoredExpertReader(merged, expert).hash()
    except (ValueError, OSError) as error:
        logger.info("the files of %s tell nothing of the expert %r: %s", place, expert, error)
        return None


def check_same_expert(folder: Path, config: ExpertLoraConfig, expert_hash: str | None, model: nn.Module):
    """ValueError where an adapter was made for another expert than the model's; a warning where nobody knows."""
    check_adapted_expert(folder, config.merged_expert, config.merged_expert_hash, expert_hash, model.name_or_path)
    if config.merged_expert_hash is None or expert_hash is None:
        logger.warning(
            "%s adapts an expert %r, and it cannot be told whether that of %s is the same: make sure that it is",
            folder,
            config.merged_expert,
            model.name_or_path or "this model",
        )


def check_settings(config: LoraConfig):
    """ValueError for a setting that does more than add a low-rank product to a linear map."""
    values = asdict(config)
    for name, default in changed_settings(values).items():
        if name not in FREE_SETTINGS:
            raise ValueError(
                f"{name} is {values[name]!r}, expected {default!r}: it does not stay inside one expert's rows"
            )
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(f"init_lora_weights is {config.init_lora_weights!r}, expected one of {INITIALISATIONS}")
    if config.task_type not in (None, TASK_TYPE):
        raise ValueError(f"task_type is {config.task_type!r}, expected {TASK_TYPE!r}")


def check_targets(model: nn.Module, config: LoraConfig):
    """ValueError unless the targets are linear maps of the decoder blocks, and there are some."""
    linears = block_linears(model)
    targets = [path for path, _ in model.named_modules() if check_target_module_exists(config, path)]
    for path in targets:
        if path not in linears:
            raise ValueError(
                f"target_modules {config.target_modules!r} reaches {path}, which is no linear map of the decoder "
                f"blocks: name such as {sorted({path.rpartition('.')[2] for path in linears})}"
            )
    if not targets:
        raise ValueError(
            f"target_modules {config.target_modules!r} finds no module: "
            f"there are {sorted({path.rpartition('.')[2] for path in linears})}"
        )


def block_linears(model: nn.Module) -> list[str]:
    """Paths of the merged linear maps but the head."""
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if is_merged_linear(module) and module is not head]


def is_merged_linear(module: nn.Module) -> bool:
    return type(module).__name__ == "ChannelMergedLinear"


def _run_adapted_expert(lora_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Name the expert that the active adapter is of, where the caller names none and no cache or router answers."""
    free = all(kwargs.get(key) is None for key in ("expert_index", "expert_labels", "past_key_values"))
    if free and not kwargs.get("router_only"):
        adapter = lora_model.active_adapters[0]
        kwargs = {**kwargs, "expert_index": lora_model.peft_config[adapter].merged_expert}
    return args, kwargs
