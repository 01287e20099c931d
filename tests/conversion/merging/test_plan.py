"""What configs and headers can tell is told before data is read: checkpoint, field or tensor, both values."""

import json
import logging
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from conversion.convert import convert
from conversion.io.sources import find_source
from conversion.io.staged_folder import FILE_LIST
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def list_files(folder):
    """Let a folder look as if a run had written it."""
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    (folder / FILE_LIST).write_text(json.dumps({"files": [FILE_LIST, *files]}))


@pytest.fixture
def llama(make_experts, write_recipe):
    """A base, two experts and their recipe."""
    base, experts = make_experts("llama", 2)
    return base, experts, parse_recipe(write_recipe(base, experts))


def test_a_plan_knows_sizes_and_experts(llama):
    base, experts, recipe = llama
    plan = make_plan(recipe)
    parameters = sum(value.numel() for value in load_file(base / "model.safetensors").values())
    assert plan.expert_names == ["e0", "e1"]
    assert plan.expert_parameters == 2 * parameters
    assert plan.bytes_to_read == 3 * 4 * parameters
    assert plan.dtype == torch.float32
    assert plan.recipe.dtype == "float32"
    assert plan.recipe.grouping.num_groups == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters .*500000.0.* 10000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05, the base has 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', the base has 'silu'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, the base has 2"),
        ({"logit_scale": 2.0}, "logit_scale 2.0, the base has nothing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True, the base has False"),
        ({"model_type": "mistral"}, "is a 'mistral' model, the base is 'llama'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_expert_that_computes_differently_is_refused(llama, fields, message):
    _, experts, recipe = llama
    change_config(experts[1], **fields)
    with pytest.raises(ValueError, match=f"expert 'e1' .*{message}"):
        make_plan(recipe)


def test_fields_that_change_no_output_are_free(llama):
    _, experts, recipe = llama
    change_config(
        experts[1],
        _name_or_path="elsewhere",
        architectures=["Other"],
        dtype="bfloat16",
        eos_token_id=3,
        use_cache=False,
        transformers_version="4.0.0",
        attention_dropout=0.3,
        initializer_range=0.5,
        unsloth_version="1",
    )
    make_plan(recipe)


def test_more_positions_are_free_where_they_are_rotary(llama, caplog):
    _, experts, recipe = llama
    change_config(experts[1], max_position_embeddings=512)
    with caplog.at_level(logging.WARNING):
        make_plan(recipe)
    assert "'e1' has max_position_embeddings 512, the base has 256; the base's value is kept" in caplog.text


def test_more_positions_are_refused_where_rotation_depends_on_them(llama):
    base, experts, recipe = llama
    for folder in (base, *experts):
        change_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    change_config(experts[1], max_position_embeddings=512)
    with pytest.raises(ValueError, match="max_position_embeddings 512, the base has 256"):
        make_plan(recipe)


def test_other_tokens_of_an_expert_are_warned_of(llama, caplog):
    _, experts, recipe = llama
    with caplog.at_level(logging.WARNING):
        make_plan(recipe)
        assert "tokens" not in caplog.text
        file = experts[1] / "tokenizer.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["model"]["vocab"]["<im>"] = values["model"]["vocab"].pop("A")
        file.write_text(json.dumps(values), encoding="utf-8")
        make_plan(recipe)
    assert "'e1' has 1 tokens that the base does not have, their rows are dropped" in caplog.text
    assert "'<im>'" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda t: t.update(surprise=torch.zeros(2)), "does not have: surprise"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(25)}),
            r"model.norm.weight has shape \[25\], expected \[24\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}),
            "lm_head.weight is stored as I8, expected F32.*quantized",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight is stored as F8_E4M3",
        ),
    ],
    ids=["missing", "extra", "shape", "integer", "float8"],
)
def test_wrong_tensors_are_refused(llama, change, message):
    _, experts, recipe = llama
    change_tensors(experts[0], change)
    with pytest.raises(ValueError, match=f"e0: .*{message}"):
        make_plan(recipe)


def test_tables_that_old_versions_saved_are_ignored(llama):
    _, experts, recipe = llama
    change_tensors(experts[0], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}))
    plan = make_plan(recipe)
    assert not any("inv_freq" in name for name in plan.readers[0].tensors)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_tied_checkpoint_may_lack_the_models_prefix(make_experts, write_recipe, family):
    base, experts = make_experts(family, 2)
    model = AutoModelForCausalLM.from_pretrained(experts[1])
    AutoModel.from_pretrained(experts[1]).save_pretrained(experts[1])
    assert not any(name.startswith(model.base_model_prefix) for name in load_file(experts[1] / "model.safetensors"))
    plan = make_plan(parse_recipe(write_recipe(base, experts)))
    for name, value in model.named_parameters():
        assert torch.equal(plan.readers[1].read(name), value), name
    for reader in (plan.base_reader, *plan.readers):
        reader.close()


def test_the_output_dtype_holds_every_checkpoint(make_experts, write_recipe, tmp_path):
    base, half = make_experts("llama", 2, dtype=torch.float16, folder=tmp_path / "half")
    _, brain = make_experts("llama", 2, dtype=torch.bfloat16, folder=tmp_path / "brain")
    assert make_plan(parse_recipe(write_recipe(base, half))).dtype == torch.float16
    assert make_plan(parse_recipe(write_recipe(base, [half[0], brain[1]]))).dtype == torch.float32
    assert make_plan(parse_recipe(write_recipe(base, brain, dtype="bfloat16"))).dtype == torch.bfloat16


def test_a_quantized_checkpoint_is_refused_by_name(llama):
    _, experts, recipe = llama
    change_config(experts[0], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="e0: .* is quantized \\(gptq\\)"):
        make_plan(recipe)


def test_a_checkpoint_of_an_unknown_format_says_what_to_do(llama):
    _, experts, recipe = llama
    (experts[0] / "model.safetensors").rename(experts[0] / "model.gguf")
    with pytest.raises(ValueError, match="e0: .*only model.gguf: save it as safetensors first"):
        make_plan(recipe)


def test_a_file_cut_short_is_refused(llama):
    _, experts, recipe = llama
    file = experts[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="e0: .*cut short"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "x: there is no folder ./nowhere"),
        ("/no/where/at/all", "x: there is no folder /no/where/at/all"),
        ("nobody/no-such-model@main", "x: there is no folder nobody/no-such-model@main and the Hub did not give it"),
        ("file", "x: file is a file"),
        ("empty", "x: empty has no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path, model, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_source("x", model, tmp_path)


def test_a_broken_config_is_named(llama):
    _, experts, recipe = llama
    (experts[0] / "config.json").write_text("{")
    with pytest.raises(ValueError, match="e0: the config of .* cannot be read"):
        make_plan(recipe)


def test_the_output_must_be_new_and_no_source(llama, tmp_path):
    base, experts, recipe = llama
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    list_files(tmp_path / "full")
    with pytest.raises(ValueError, match="full is not empty"):
        make_plan(recipe, tmp_path / "full")
    make_plan(recipe, tmp_path / "full", overwrite=True)
    with pytest.raises(ValueError, match="expert1 does not say what was written there"):
        make_plan(recipe, experts[1], overwrite=True)
    list_files(experts[1])
    with pytest.raises(ValueError, match="holds the checkpoint of e1"):
        make_plan(recipe, experts[1], overwrite=True)
    (base.parent / "config.json").touch()
    list_files(base.parent)
    with pytest.raises(ValueError, match="holds the checkpoint of base_model"):
        make_plan(recipe, base.parent, overwrite=True)


def test_a_full_disk_is_seen_before(llama, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ValueError, match="needs up to 0.00 GB, but 0.00 GB are free"):
        convert(llama[2], tmp_path / "not" / "there" / "yet", progress=False)
    assert not (tmp_path / "not").exists()


def test_relative_models_are_looked_up_beside_the_recipe(llama, write_recipe):
    base, experts, _ = llama
    data = write_recipe(base.name, [expert.name for expert in experts])
    plan = make_plan(parse_recipe(data, folder=base.parent))
    assert [source.record() for source in plan.experts] == [
        {"name": "e0", "model": "expert0"},
        {"name": "e1", "model": "expert1"},
    ]
