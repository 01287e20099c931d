"""The router of a checkpoint with the blocks that it reads, and nothing behind them."""

import re

from transformers import AutoConfig

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM, ChannelMergedModel

LAYER = re.compile(r"\.layers\.(\d+)\.")


def trunk_config(checkpoint: str) -> ChannelMergedConfig:
    """The checkpoint's config with the router's blocks alone; ValueError where it is not channel-merged."""
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != "channel_merged":
        raise ValueError(f"{checkpoint}: model_type is {config.model_type!r}, expected 'channel_merged'")
    layers, text_config = config.router["layers"], config.text_config
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = text_config.layer_types[:layers]
    config.rows = {path: rows for path, rows in config.rows.items() if is_in_trunk(path, layers)}
    return config


def is_in_trunk(path: str, layers: int) -> bool:
    """Whether a module, by its path, is of no later block than the first `layers`."""
    block = LAYER.search(f"{path}.")
    return block is None or int(block[1]) < layers


class RouterTrunk(ChannelMergedModel):
    """`RouterTrunk.from_pretrained(checkpoint, config=trunk_config(checkpoint))` routes as the whole model does."""

    router_inputs = ChannelMergedForCausalLM.router_inputs

    def _build_inner(self, inner):
        inner = super()._build_inner(inner)
        first = "|".join(map(str, range(self.config.router["layers"])))
        self._keys_to_ignore_on_load_unexpected.append(rf"^model\..*\.layers\.(?!(?:{first})\.)\d+\.")
        return inner
