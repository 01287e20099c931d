"""vLLM plugin for channel-merged checkpoints. vLLM calls `register` in each of its processes."""


def register():
    """Make the checkpoint's config and architecture known to vLLM; the model's file is imported when it is needed."""
    from vllm import ModelRegistry

    import modeling_channel_merged  # noqa: F401  registers the config, so that no code of a checkpoint is run

    ModelRegistry.register_model("ChannelMergedForCausalLM", "channel_merged_vllm.model:ChannelMergedForCausalLM")
