"""A LoRA of one expert changes that expert alone, trained in memory and folded in, or it is refused."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conversion.add_expert import add_expert
from conversion.convert import convert
from conversion.expert_lora import ExpertLora, adapt_expert
from conversion.export import export_expert
from conversion.hub.model_folder import write_code
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from modeling_channel_merged.active_experts import ActiveExperts, activate

NAMES = ["instruct", "math", "code"]
PROMPTS = torch.randint(3, 23, (6, 7), generator=torch.Generator().manual_seed(5))
ARCHITECTURES = ["llama", "qwen2-tied", "qwen3", "gpt2-tied"]

# PEFT 0.21 still asks Transformers by the deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def randomize(peft_model, seed=0):
    """Values of an adapter that was trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft_model


@torch.no_grad()
def all_logits(model):
    """Logits of every expert: each alone, and all in one mixed batch."""
    logits = {name: model(PROMPTS, expert_index=name).logits for name in NAMES}
    return logits | {"mixed": model(PROMPTS, expert_index=NAMES * 2).logits}


def exported(checkpoint, expert, folder):
    export_expert(checkpoint, expert, folder, overwrite=True)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_in_memory_and_folded(write_checkpoint, tmp_path, architecture):
    """The PeftModel's logits are those of the folded checkpoint; the other experts are what they were, bit for bit."""
    stored = write_checkpoint(tmp_path / "merged", architecture)
    before = all_logits(load(stored.folder))
    peft_model = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=3, lora_alpha=5)))
    adapted = all_logits(peft_model)
    for name in ("instruct", "code"):
        assert torch.equal(adapted[name], before[name])
    assert (adapted["math"] - before["math"]).abs().max() > 0.01
    rows = torch.arange(6) % 3 == 1
    torch.testing.assert_close(adapted["mixed"][rows], adapted["math"][rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted["mixed"][~rows], before["mixed"][~rows], rtol=1e-5, atol=1e-6)
    peft_model.save_pretrained(tmp_path / "adapter")
    result = add_expert(
        stored.folder, tmp_path / "adapter", tmp_path / "fixed", "math", replace=True, progress=False, chunk_bytes=999
    )
    folded = all_logits(load(tmp_path / "fixed"))
    torch.testing.assert_close(folded["math"], adapted["math"], rtol=1e-4, atol=1e-5)
    for name in ("instruct", "code"):
        ours, theirs = (exported(folder, name, tmp_path / "out") for folder in (tmp_path / "fixed", stored.folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        torch.testing.assert_close(folded[name], before[name], rtol=1e-5, atol=1e-6)
    # What is not adapted (the embedding, the head) goes on reading the rows that it read.
    assert result.reused_rows > 0 and result.new_rows > 0


def test_folded_as_a_new_expert(write_checkpoint, tmp_path):
    """Without --replace the adapter's expert stays, and the adapted one comes beside it, with its own files."""
    stored = write_checkpoint(tmp_path / "merged", vocab_sizes=(23, 20, 21))
    own = stored.folder / "experts" / "math" / "generation_config.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    (stored.folder / "additional_chat_templates").mkdir()
    (stored.folder / "additional_chat_templates" / "math.jinja").write_text("math")
    peft_model = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=3, target_modules=["up_proj"])))
    peft_model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = peft_model(PROMPTS % 20).logits
    add_expert(stored.folder, tmp_path / "adapter", tmp_path / "out", "geometry", progress=False)
    model = load(tmp_path / "out")
    assert model.config.expert_names == [*NAMES, "geometry"]
    assert (tmp_path / "out" / "experts" / "geometry" / "generation_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "additional_chat_templates" / "geometry.jinja").read_text() == "math"
    with torch.no_grad():
        logits = model(PROMPTS % 20, expert_index="geometry").logits
    torch.testing.assert_close(logits, adapted, rtol=1e-4, atol=1e-5)
    assert (logits[..., 20:] == float("-inf")).all() and logits[..., :20].isfinite().all()
    for name in NAMES:
        ours, theirs = (exported(folder, name, tmp_path / "e") for folder in (tmp_path / "out", stored.folder))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_converted_checkpoint_in_bfloat16(make_experts, write_recipe, tmp_path):
    """Folded rows are the adapter's, rounded once, in a checkpoint that a conversion made."""
    base, experts = make_experts("qwen2", 3, dtype=torch.bfloat16, shared=0.4)
    convert(parse_recipe(write_recipe(base, experts, preset="paper-ties")), tmp_path / "merged", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    peft_model = randomize(adapt_expert(model, "e1", LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj"])))
    peft_model.save_pretrained(tmp_path / "adapter")
    add_expert(tmp_path / "merged", tmp_path / "adapter", tmp_path / "out", "e1", replace=True, progress=False)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        adapted, logits = peft_model(PROMPTS).logits, folded(PROMPTS, expert_index="e1").logits
        change = (adapted - model(PROMPTS, expert_index="e0").logits).abs().mean()
    assert adapted.dtype == torch.bfloat16 and (logits - adapted).abs().mean() < change / 10
    before, after = (exported(tmp_path / name, "e1", tmp_path / "e") for name in ("merged", "out"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in before.items():
        if "q_proj.weight" in name:
            module = "base_model.model.model." + name.removesuffix(".weight")
            delta = tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()
            assert torch.equal(after[name], (value.float() + 4 / 3 * delta).to(torch.bfloat16))
        else:
            assert torch.equal(after[name], value)


class Tokens(Dataset):
    """The same few texts again and again."""

    def __len__(self):
        return 32

    def __getitem__(self, number):
        return {"input_ids": PROMPTS[number % 6], "labels": PROMPTS[number % 6]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(stored, tmp_path, checkpointing):
    """No batch names an expert: the adapted one trains, is evaluated, and goes on from a saved adapter."""
    before = all_logits(load(stored.folder))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    peft_model = adapt_expert(load(stored.folder), "math", config)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        label_names=["labels"],
        activation_checkpointing=checkpointing,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(peft_model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.1
    peft_model.eval()
    after = all_logits(peft_model)
    assert torch.equal(after["instruct"], before["instruct"]) and torch.equal(after["code"], before["code"])
    assert not torch.equal(after["math"], before["math"])
    trainer.save_model(tmp_path / "adapter")
    again = adapt_expert(load(stored.folder), "math", tmp_path / "adapter").eval()
    assert torch.equal(all_logits(again)["mixed"], after["mixed"])
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
    with again.disable_adapter():
        assert torch.equal(all_logits(again)["math"], before["math"])


def test_generate_and_route(stored):
    """`generate` routes as ever unless an expert is named, and runs the adapter where its expert answers."""
    peft_model = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=4)))
    keys = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    routed = peft_model.generate(input_ids=PROMPTS, **keys)
    assert (routed.expert_index == 0).all()  # the default expert of an untrained router
    assert torch.equal(routed.sequences, load(stored.folder).generate(PROMPTS, **keys).sequences)
    named = peft_model.generate(input_ids=PROMPTS, expert_index="math", **keys)
    with torch.no_grad():
        first = peft_model(PROMPTS).logits[:, -1].argmax(-1)  # names no expert: the adapted one
    assert torch.equal(named.sequences[:, 7], first)


def test_two_adapters_of_two_experts(stored):
    """A second adapter by PEFT's own call reaches its own expert only; one that is no expert's is refused."""
    before = all_logits(load(stored.folder))
    math = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=3)))
    code = randomize(adapt_expert(load(stored.folder), "code", LoraConfig(r=2)), seed=1)
    code_config = code.peft_config["default"]
    math.add_adapter("code", code_config)
    with torch.no_grad():
        for name, parameter in math.named_parameters():
            if ".code." in name:
                parameter.copy_(code.get_parameter(name.replace(".code.", ".default.")))
    math.base_model.set_adapter(["default", "code"])
    both = all_logits(math)
    assert torch.equal(both["instruct"], before["instruct"])
    torch.testing.assert_close(both["code"], all_logits(code)["code"])
    with pytest.raises(ValueError, match="adapter 'plain' is no LoRA of an expert: add it with adapt_expert"):
        math.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


def test_the_code_beside_the_weights(stored, tmp_path):
    """The model's classes may be those that Transformers loads from the checkpoint's own files."""
    expected = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=3)))
    write_code(stored.folder)
    remote = get_class_from_dynamic_module("modeling_channel_merged.ChannelMergedForCausalLM", stored.folder)
    model = remote.from_pretrained(stored.folder, config=remote.config_class.from_pretrained(stored.folder)).eval()
    assert type(model) is not type(load(stored.folder))
    peft_model = randomize(adapt_expert(model, "math", LoraConfig(r=3)))
    actual = all_logits(peft_model)
    assert all(torch.equal(actual[name], value) for name, value in all_logits(expected).items())


@pytest.mark.parametrize("flat", [False, True], ids=["batch", "flattened"])
def test_the_layer_adds_to_the_rows_of_its_expert(stored, flat):
    """A plain sum over the batch, also where an architecture flattens it before its linear maps."""
    peft_model = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=3, lora_alpha=6)))
    layer = next(module for module in peft_model.modules() if isinstance(module, ExpertLora))
    hidden_states = torch.randn(4, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 0, 2, 1])
    with torch.no_grad(), activate(ActiveExperts.from_index(index)):
        output = layer(hidden_states.flatten(0, 1)).unflatten(0, (4, 5)) if flat else layer(hidden_states)
        base = layer.base_layer(hidden_states)
        delta = 2 * hidden_states @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(output, base + delta * (index == 1)[:, None, None], rtol=1e-5, atol=1e-6)


# What would change the others, or nothing at all, is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "bias is 'all', expected 'none': it does not stay inside one expert's rows"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is .*embed_tokens"),
        ({"use_dora": True}, "use_dora is True"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', expected 'CAUSAL_LM'"),
        ({"target_modules": ["rows"]}, r"reaches model\.\S+\.rows, which is no linear map of the decoder blocks"),
        ({"target_modules": ["lm_head"]}, "reaches model.lm_head, which is no linear map"),
        ({"target_modules": ["embed_tokens"]}, "reaches model.model.embed_tokens, which is no linear map"),
        ({"target_modules": ["head"]}, "reaches router.head, which is no linear map"),
        ({"target_modules": ["query"]}, "finds no module: there are .*'q_proj'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_reach_further_are_refused(stored, settings, message):
    model = load(stored.folder)
    with pytest.raises(ValueError, match=message):
        adapt_expert(model, "math", LoraConfig(r=2, **settings))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_unknown_experts_and_models_are_refused(stored, make_experts):
    with pytest.raises(ValueError, match="unknown expert 'maths'"):
        adapt_expert(load(stored.folder), "maths", LoraConfig())
    base, _ = make_experts("llama", 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no channel-merged model"):
        adapt_expert(load(base), "math", LoraConfig())


@pytest.fixture
def adapter(stored, tmp_path):
    randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=2))).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merging_in_memory_is_refused(stored):
    peft_model = adapt_expert(load(stored.folder), "math", LoraConfig(r=2))
    assert any(isinstance(module, ExpertLora) for module in peft_model.modules())
    for call in (peft_model.merge_and_unload, peft_model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into rows that experts share: save it, and fold it"):
            call()


def test_an_adapter_knows_its_expert(stored, adapter, write_recipe, make_experts):
    """Loaded as another expert's, by PEFT alone, or converted as an adapter of a base, it is refused."""
    assert json.loads((adapter / "adapter_config.json").read_text())["merged_expert"] == "math"
    with pytest.raises(ValueError, match="is an adapter of the expert 'math', expected one of the expert 'code'"):
        adapt_expert(load(stored.folder), "code", adapter)
    base, experts = make_experts("llama", 1)
    message = "load it with conversion.expert_lora.adapt_expert.model, FOLDER.*not found in the base model"
    for model in (load(stored.folder), load(base)):
        with pytest.warns(UserWarning, match="merged_expert"), pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(model, adapter)
    with pytest.raises(
        ValueError, match="e0: .* adapts the expert 'math' of a .*: fold it .* channel-merge add-expert"
    ):
        make_plan(parse_recipe(write_recipe(base, [adapter, *experts])))


@pytest.mark.parametrize("text", ["[]", "null", "{", None])
def test_a_config_that_is_none_is_one_line(stored, tmp_path, text):
    """`[]` is JSON and no object; without a file nothing can be read."""
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(stored.folder)
    with pytest.raises(ValueError, match="adapter_config.json of .* cannot be read: [^\n]+$"):
        adapt_expert(model, "math", tmp_path)


def test_loaded_by_one_call(stored, adapter):
    """The folder knows its expert."""
    expected = randomize(adapt_expert(load(stored.folder), "math", LoraConfig(r=2)))
    for folder in (adapter, str(adapter)):
        again = adapt_expert(load(stored.folder), folder)
        assert again.peft_config["default"].merged_expert == "math"
        assert all(torch.equal(all_logits(again)[name], value) for name, value in all_logits(expected).items())
    with pytest.raises(ValueError, match="'math' is an expert: give a LoraConfig for it as well, or a folder"):
        adapt_expert(load(stored.folder), "math")
    with pytest.raises(ValueError, match="adapter_config.json of nowhere cannot be read"):
        adapt_expert(load(stored.folder), "nowhere")


def change_adapter(adapter, **values):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_adapter_from_before_there_were_hashes(stored, adapter, tmp_path, caplog):
    """It names its modules as PEFT does; nobody can tell what it was made for, which is said."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = all_logits(adapt_expert(load(stored.folder), adapter))
    modules = config.pop("merged_target_modules")
    config.pop("merged_expert_hash")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": modules}))
    with caplog.at_level(logging.WARNING):
        actual = all_logits(adapt_expert(load(stored.folder), adapter))
        assert "it cannot be told whether that of" in caplog.text
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        change_adapter(adapter, base_model_name_or_path="another")
        add_expert(stored.folder, adapter, tmp_path / "out", "math", replace=True, progress=False)
    assert "make sure that they are the same model" in caplog.text


def test_an_adapter_of_another_checkpoint_is_refused(write_checkpoint, adapter, tmp_path, caplog):
    other = write_checkpoint(tmp_path / "other", expert_names=("law", "medical"))
    with pytest.raises(ValueError, match="adapts the expert 'math', but .* has .*law"):
        add_expert(other.folder, adapter, tmp_path / "out", "law", replace=True, progress=False)
    with pytest.raises(ValueError, match="unknown expert 'math': this model has .*law"):
        adapt_expert(load(other.folder), adapter)
    other = write_checkpoint(tmp_path / "third", seed=1)
    message = "was made for an expert 'math' with the hash [0-9a-f]{12}, expected [0-9a-f]{12}, that of .*third"
    with pytest.raises(ValueError, match=message):
        add_expert(other.folder, adapter, tmp_path / "out", "math", replace=True, progress=False)
    with pytest.raises(ValueError, match=message):
        adapt_expert(load(other.folder), adapter)
    assert not (tmp_path / "out").exists()
    same = write_checkpoint(tmp_path / "same")
    with caplog.at_level(logging.WARNING):
        adapt_expert(load(same.folder), adapter)
        add_expert(same.folder, adapter, tmp_path / "out", "math", replace=True, progress=False)
    assert not caplog.records


def test_what_became_of_the_rest_of_the_checkpoint_does_not_matter(stored, adapter, tmp_path):
    """A trained router, another dtype in memory and one more expert leave the expert what it was; folding does not."""
    model = load(stored.folder)
    torch.nn.init.ones_(model.router.head.weight)
    model.save_pretrained(tmp_path / "routed", max_shard_size="10KB")
    adapt_expert(AutoModelForCausalLM.from_pretrained(tmp_path / "routed", dtype=torch.float16), adapter)
    add_expert(tmp_path / "routed", adapter, tmp_path / "larger", "algebra", progress=False)
    adapt_expert(load(tmp_path / "larger"), adapter)
    add_expert(stored.folder, adapter, tmp_path / "fixed", "math", replace=True, progress=False)
    with pytest.raises(ValueError, match="was made for an expert 'math' with the hash"):
        adapt_expert(load(tmp_path / "fixed"), adapter)


def test_an_adapter_replaces_its_own_expert_only(stored, adapter, tmp_path):
    with pytest.raises(ValueError, match="adapts the expert 'math', expected one of 'code', which it is to replace"):
        add_expert(stored.folder, adapter, tmp_path / "out", "code", replace=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_lora_of_the_stored_rows_is_refused(stored, tmp_path):
    """PEFT's own "all-linear" adapts `rows`, which experts share; that cannot be one expert."""
    model = get_peft_model(load(stored.folder), LoraConfig(r=2, target_modules=["q_proj.rows"]))
    model.save_pretrained(tmp_path / "rows")
    before = load(stored.folder)(PROMPTS, expert_index="code").logits
    assert not torch.equal(randomize(model)(PROMPTS, expert_index="code").logits, before)  # why it is refused
    with pytest.raises(ValueError, match=r"math: .* adapts rows that experts share \(.*q_proj.rows.*adapt_expert"):
        add_expert(stored.folder, tmp_path / "rows", tmp_path / "out", "math", replace=True, progress=False)
