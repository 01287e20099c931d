"""Weights that accelerate keeps elsewhere: the model routes and answers as it does with all of them."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file

from modeling_channel_merged import ChannelMergedForCausalLM
from modeling_channel_merged.expert_router import keep_router_in_memory

from .conftest import CONFIGS, GREEDY, random_model


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_routes_and_answers(text_config, prompts, tmp_path, kind, trained):
    """Every weight, the router's too, is on the meta device but while its module runs."""
    model = random_model(text_config, 3, trained_router=trained)
    expected = model.route(prompts)
    text, mixed = (model.generate(prompts, expert_index=experts, **GREEDY) for experts in (1, [2, 0, 1]))
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.router.head.weight.is_meta
    routing = model.route(prompts)
    assert torch.equal(routing.logits, expected.logits) and torch.equal(routing.expert_index, expected.expert_index)
    assert torch.equal(model.generate(prompts, expert_index=1, **GREEDY), text)
    assert torch.equal(model.generate(prompts, expert_index=[2, 0, 1], **GREEDY), mixed)


def layers(*devices: str) -> dict[str, str]:
    """A device map of three blocks; what comes before them is in memory, what comes after is on the disk."""
    blocks = {f"model.model.layers.{number}": device for number, device in enumerate(devices)}
    before = {"model.model.embed_tokens": "cpu", "model.model.rotary_emb": "cpu"}
    return {**before, **blocks, "model.model.norm": "disk", "model.lm_head": "disk", "router": "disk"}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize(
    ("family", "device_map", "share"),
    [
        ("llama", {"": "disk"}, None),
        ("llama", layers("cpu", "disk", "disk"), None),
        ("qwen3", {"model": "cpu", "router.head": "disk", "router.ngrams": "cpu"}, None),
        ("qwen2", "auto", 2),
        ("qwen2", "auto", 8),
    ],
    ids=["all on disk", "by block", "parts of the router", "half by itself", "an eighth by itself"],
)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_device_map_changes_no_answer(family, device_map, share, prompts, tmp_path, trained):
    """The router is in memory, whatever the map says: a fresh checkpoint has no n-grams that could be read again."""
    model = random_model(CONFIGS[family](), 3, trained_router=trained)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    if not trained:
        for file in (tmp_path / "model").glob("*.safetensors"):
            tensors = load_file(file)
            if tensors.pop("router.ngrams.weight", None) is not None:
                save_file(tensors, file, metadata={"format": "pt"})
    given = device_map.copy() if isinstance(device_map, dict) else device_map
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.model.parameters())
    offloaded = ChannelMergedForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=given,
        max_memory=None if share is None else {"cpu": size // share, "disk": 1 << 40},
        offload_folder=tmp_path / "offload",
    )
    assert given == device_map
    if family != "qwen3":
        assert any(parameter.is_meta for parameter in offloaded.model.parameters())
    assert not any(parameter.is_meta for parameter in offloaded.router.parameters())
    assert torch.equal(offloaded.route(prompts).logits, model.route(prompts).logits)
    for expert_index in (None, 1, [2, 0, 1]):
        expected = model.generate(prompts, expert_index=expert_index, **GREEDY)
        assert torch.equal(offloaded.generate(prompts, expert_index=expert_index, **GREEDY), expected)
    offloaded.save_pretrained(tmp_path / "saved")
    saved = ChannelMergedForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("device_map", "kept"),
    [
        ({"": 0}, {"": 0}),
        ({"model": 0, "router": "cpu"}, {"model": 0, "router": 0}),
        ({"": torch.device("cuda", 1), "model.lm_head": "disk"}, {"model": torch.device("cuda", 1), "router": 1}),
        ({"model.a": "disk", "model.b": 1, "model.c": 0, "router.head": "disk", "router.ngrams": 0}, {"router": 1}),
        ({"": "cpu"}, {"": "cpu"}),
    ],
    ids=str,
)
def test_the_router_is_on_the_main_device(device_map, kept):
    """The first that is neither CPU nor disk, as accelerate has it; a map that offloads nothing stays."""
    others = {name: device for name, device in device_map.items() if name.startswith("model")}
    keep_router_in_memory(device_map)
    devices = {name: getattr(device, "index", device) for name, device in device_map.items()}
    assert devices == {name: getattr(device, "index", device) for name, device in (others | kept).items()}
