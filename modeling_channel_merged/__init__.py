"""Channel-merged causal language models for Transformers (Channel Merging, Zhang et al., AAAI 2025, arXiv 2412.15283).

Importing this package registers the classes with the Auto classes, so that checkpoints load without
`trust_remote_code` where it is installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_channel_merged import ChannelMergedConfig
from .modeling_channel_merged import ChannelMergedForCausalLM, ChannelMergedModel

AutoConfig.register("channel_merged", ChannelMergedConfig)
AutoModel.register(ChannelMergedConfig, ChannelMergedModel)
AutoModelForCausalLM.register(ChannelMergedConfig, ChannelMergedForCausalLM)

# Saving copies the code files beside the weights.
ChannelMergedConfig.register_for_auto_class()
ChannelMergedModel.register_for_auto_class("AutoModel")
ChannelMergedForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["ChannelMergedConfig", "ChannelMergedForCausalLM", "ChannelMergedModel"]
