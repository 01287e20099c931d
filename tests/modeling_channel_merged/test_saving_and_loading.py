"""What is saved is what is loaded: by the package, by its copy in the checkpoint, and from older checkpoints."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig

from modeling_channel_merged import ChannelMergedForCausalLM, ChannelMergedModel
from modeling_channel_merged.active_experts import ActiveExperts, activate

from .conftest import CONFIGS, SIZES, random_model


def test_save_and_load(text_config, prompts, tmp_path):
    model = random_model(text_config, 3)
    model.save_pretrained(tmp_path)
    loaded, info = ChannelMergedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(prompts).logits, model(prompts).logits)
    headless, info = ChannelMergedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = model(prompts, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(headless(prompts).last_hidden_state, expected)


def test_a_base_whose_files_name_tensors_otherwise(prompts, tmp_path):
    """Transformers writes a GPT-NeoX head as `embed_out`."""
    model = random_model(GPTNeoXConfig(**{key: size for key, size in SIZES.items() if "key_value" not in key}), 3)
    model.save_pretrained(tmp_path)
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == load_file(tmp_path / "model.safetensors").keys() | {"router.ngrams.weight"}
    assert torch.equal(loaded(prompts, expert_index=1).logits, model(prompts, expert_index=1).logits)


def test_auto_classes_find_the_model(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ChannelMergedForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is ChannelMergedModel


def test_tied_embeddings_stay_tied(prompts, tmp_path):
    model = random_model(CONFIGS["qwen2"](), 3)
    model.save_pretrained(tmp_path)
    assert "model.lm_head.rows.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.lm_head.rows.weight is loaded.model.model.embed_tokens.rows.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_router_and_index(llama_model, prompts, tmp_path, dtype):
    llama_model.save_pretrained(tmp_path)
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.router.head.weight.dtype == torch.float32
    for module in loaded.channel_modules().values():
        assert module.rows.weight.dtype == dtype and module.channel_index.dtype == torch.int32
    assert loaded(prompts, expert_index=[0, 1, 2]).logits.dtype == dtype


REMOTE = """
import sys
import torch
import torch._dynamo.testing
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
headless = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
prompts = torch.load(sys.argv[2])
with torch.no_grad():
    output = model(prompts)
    torch.save((output.logits, output.expert_index, headless(prompts).last_hidden_state), sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


def test_remote_code_in_a_fresh_offline_process(llama_model, prompts, tmp_path, without_package):
    """Logits and routing survive saving, loading without this package, saving from there, and loading again."""
    llama_model.save_pretrained(tmp_path / "first")
    torch.save(prompts, tmp_path / "prompts.pt")
    with torch.no_grad():
        expected = llama_model(prompts)
    for source, target in (("first", "second"), ("second", "third")):
        subprocess.run(
            [
                sys.executable,
                "-c",
                without_package + REMOTE,
                tmp_path / source,
                tmp_path / "prompts.pt",
                tmp_path / "out.pt",
                tmp_path / target,
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        logits, expert_index, hidden_states = torch.load(tmp_path / "out.pt")
        assert torch.equal(logits, expected.logits) and torch.equal(expert_index, expected.expert_index)
        assert hidden_states.shape == (3, 7, 48)


def test_saved_code_is_the_packages_own(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    package = Path(sys.modules["modeling_channel_merged"].__file__).parent
    shipped = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == shipped
    assert all((tmp_path / name).read_text() == (package / name).read_text() for name in shipped)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_channel_index_is_an_error(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.pop("model.model.layers.1.mlp.up_proj.channel_index"))
    with pytest.raises(ValueError, match="no model.model.layers.1.mlp.up_proj.channel_index"):
        ChannelMergedForCausalLM.from_pretrained(tmp_path)


def test_channel_index_out_of_range_is_an_error(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors["model.lm_head.channel_index"].fill_(9999))
    with pytest.raises(ValueError, match="lm_head.channel_index holds row 9999"):
        ChannelMergedForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_without_a_router_loads_untrained(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("router.")])
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    assert not loaded.router.is_trained


def test_checkpoint_from_before_ngrams_routes_as_it_did(llama_model, prompts, tmp_path):
    """Its config names no features, and its head reads the layer-normalised trunk features alone."""
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.pop("router.ngrams.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["format_version"] = 1
    for key in ("features", "temperature", "max_tokens", "context"):
        del config["router"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    features = llama_model.router_features(prompts)[:, :48] * 48**0.5
    assert loaded.config.router["features"] == "trunk" and loaded.router.ngrams is None
    torch.testing.assert_close(loaded.route(prompts).logits, llama_model.router.head(features))


def test_ngrams_follow_the_token_ids_and_survive_saving(llama_model, prompts, tmp_path):
    nn.init.zeros_(llama_model.router.head.weight)
    expected = llama_model.route(prompts).logits
    assert not torch.equal(expected, llama_model.route(prompts.flip(0)).logits)
    embeddings = llama_model.get_input_embeddings()
    with activate(ActiveExperts(0)):
        inputs_embeds = embeddings(prompts)
    assert llama_model.route(inputs_embeds=inputs_embeds).logits.abs().max() == 0
    llama_model.save_pretrained(tmp_path)
    assert torch.equal(ChannelMergedForCausalLM.from_pretrained(tmp_path).route(prompts).logits, expected)


def test_copies_and_pickles(llama_model, prompts):
    expected = llama_model(prompts).logits
    assert torch.equal(copy.deepcopy(llama_model)(prompts).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(llama_model))(prompts).logits, expected)
