"""A new expert is what it was alone, the others stay bit for bit as they were, and nothing half-written loads."""

import json
import logging
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conversion import add_expert as module
from conversion.add_expert import add_expert
from conversion.addition.router_growth import ROUTER_MARGIN, grow_router
from conversion.channels.row_layout import layout_rows
from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.convert import convert
from conversion.export import export_expert
from conversion.merging.recipe import parse_recipe
from conversion.push import check_checkpoint
from conversion.report import report_tables
from conversion.train_router import main as train_router_of
from conversion.vocabulary.own_vocabulary import named_templates


def load_tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def exported(checkpoint, expert, folder):
    """Tensors of an expert as a plain checkpoint."""
    export_expert(checkpoint, expert, folder / f"{checkpoint.name}-{expert}", overwrite=True)
    return load_tensors(folder / f"{checkpoint.name}-{expert}")


def plain_state(folder):
    """Tensors of a plain checkpoint, without a head that its config ties."""
    tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    return {name: value for name, value in load_tensors(folder).items() if not (tied and name == "lm_head.weight")}


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(left[name], value), name


def router_tensors(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("router.")}


def train_router(folder):
    """Any values in the router."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    for name, value in router_tensors(tensors).items():
        tensors[name] = torch.randn(value.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


# PEFT 0.21 still asks Transformers by the deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def merged(make_experts, write_recipe, tmp_path):
    """Factory: a merged checkpoint of the first experts of a family, the base, and all experts' folders."""

    def make(family="llama", num_experts=3, num_merged=None, dtype=torch.float32, **keys):
        base, experts = make_experts(family, num_experts, dtype=dtype, shared=0.4)
        num_merged = num_experts - 1 if num_merged is None else num_merged
        recipe = write_recipe(base, experts[:num_merged], preset="paper-ties", **keys)
        convert(parse_recipe(recipe), tmp_path / "merged", progress=False)
        return tmp_path / "merged", base, experts

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_others_stay_and_the_new_one_is_exact(merged, tmp_path, family, dtype):
    checkpoint, _, experts = merged(family, 4, dtype=dtype)
    result = add_expert(checkpoint, experts[3], tmp_path / "out", "e3", progress=False, chunk_bytes=5000)
    for name in ("e0", "e1", "e2"):
        assert_same_tensors(exported(tmp_path / "out", name, tmp_path), exported(checkpoint, name, tmp_path))
    assert_same_tensors(exported(tmp_path / "out", "e3", tmp_path), plain_state(experts[3]))
    # The base's own rows, of which 0.4 ** 3 are stored unmerged, are not stored again.
    assert result.reused_rows > 0 and result.relative_error == 0.0


def test_logits_of_all_experts(merged, tmp_path):
    checkpoint, _, experts = merged("qwen2")
    add_expert(checkpoint, experts[2], tmp_path / "out", "e2", progress=False)
    before, after, alone = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, tmp_path / "out", experts[2])
    )
    prompts = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("e0", "e1"):
            expected = before(prompts, expert_index=name).logits
            torch.testing.assert_close(after(prompts, expert_index=name).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after(prompts, expert_index="e2").logits, alone(prompts).logits)
        mixed = after(prompts, expert_index=["e2", "e0", "e2"]).logits
        torch.testing.assert_close(mixed[[0, 2]], alone(prompts[[0, 2]]).logits)


def test_rows_are_laid_out_as_a_conversion_lays_them_out(merged, tmp_path):
    """With nothing merged the result is that of a conversion of all experts, tensor for tensor."""
    checkpoint, base, experts = merged("gpt2", 4, grouping={"num_groups": 4})
    add_expert(checkpoint, experts[3], tmp_path / "out", "e3", progress=False, max_shard_size="30KB")
    names = [{"name": f"e{number}", "model": str(folder)} for number, folder in enumerate(experts)]
    recipe = {"base_model": str(base), "experts": names, "preset": "paper-ties", "grouping": {"num_groups": 4}}
    convert(parse_recipe(recipe), tmp_path / "whole", progress=False)
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "whole"))
    ours, theirs = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("out", "whole"))
    own = {"merge", "_name_or_path"}
    assert {key: ours[key] for key in ours.keys() - own} == {key: theirs[key] for key in theirs.keys() - own}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_replace(merged, tmp_path, number):
    """An exchanged expert keeps its place; rows that only it read are gone."""
    checkpoint, base, experts = merged(num_experts=4, num_merged=3, grouping={"num_groups": 3})
    name = f"e{number}"
    result = add_expert(checkpoint, experts[3], tmp_path / "out", name, replace=True, progress=False)
    for other in {"e0", "e1", "e2"} - {name}:
        assert_same_tensors(exported(tmp_path / "out", other, tmp_path), exported(checkpoint, other, tmp_path))
    assert_same_tensors(exported(tmp_path / "out", name, tmp_path), plain_state(experts[3]))
    folders = [*experts[:3]]
    folders[number] = experts[3]
    names = [{"name": f"e{place}", "model": str(folder)} for place, folder in enumerate(folders)]
    recipe = {"base_model": str(base), "experts": names, "preset": "paper-ties", "grouping": {"num_groups": 3}}
    whole = convert(parse_recipe(recipe), tmp_path / "whole", progress=False)
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "whole"))
    assert result.parameters == whole.report["parameters"]["stored"]


def test_the_same_expert_again_adds_no_rows(merged, tmp_path):
    checkpoint, _, experts = merged(grouping={"num_groups": 3}, num_merged=3)
    result = add_expert(checkpoint, experts[1], tmp_path / "out", "twin", progress=False)
    per_expert = sum(value.numel() for name, value in load_tensors(checkpoint).items() if ".experts.0." in name)
    assert result.new_rows == 0 and result.added_parameters == per_expert


# Tolerance


def test_tolerance_takes_the_nearest_stored_row(merged, tmp_path):
    """Against a slow reference, channel by channel; the old experts stay, and the error is what was measured."""
    checkpoint, base, experts = merged(num_experts=4)
    start, near = plain_state(base), plain_state(experts[0])  # the new expert is a fine-tune of the first one
    noise = {name: value - start[name] for name, value in plain_state(experts[3]).items()}
    own = {name: value + 0.3 * noise[name] for name, value in near.items()}
    save_file(own, experts[3] / "model.safetensors", metadata={"format": "pt"})
    limit = 0.6
    result = add_expert(
        checkpoint, experts[3], tmp_path / "out", "e3", tolerance=limit, base=base, progress=False, chunk_bytes=3000
    )
    for name in ("e0", "e1", "e2"):
        assert_same_tensors(exported(tmp_path / "out", name, tmp_path), exported(checkpoint, name, tmp_path))
    others = [exported(checkpoint, name, tmp_path) for name in ("e0", "e1", "e2")]
    used = exported(tmp_path / "out", "e3", tmp_path)
    near = error = change = 0.0
    for name, rows in own.items():
        if rows.dim() == 1:
            assert torch.equal(used[name], rows)
            continue
        for channel, row in enumerate(rows.double()):
            delta = (row - start[name][channel].double()).norm()
            distances = torch.stack([(row - other[name][channel].double()).norm() for other in others])
            expected = rows[channel]
            if distances.min() <= limit * delta:
                expected = others[int(distances.argmin())][name][channel]
                near += bool(distances.min() > 0)
            assert torch.equal(used[name][channel], expected), (name, channel)
            change += float(delta**2)
            error += float((row - used[name][channel].double()).norm() ** 2)
    assert near > 10
    assert result.relative_error == pytest.approx(math.sqrt(error / change), rel=1e-4)
    exact = add_expert(checkpoint, experts[3], tmp_path / "exact", "e3", progress=False)
    assert exact.new_rows == result.new_rows + near


def test_tolerance_needs_the_base(merged, tmp_path):
    checkpoint, base, experts = merged()
    moved = base.rename(base.with_name("elsewhere"))
    with pytest.raises(ValueError, match="the base model is needed .*of 'base' .* where it is: name it with --base"):
        add_expert(checkpoint, experts[2], tmp_path / "out", "e2", tolerance=0.5, progress=False)
    add_expert(checkpoint, experts[2], tmp_path / "out", "e2", tolerance=0.5, base=moved, progress=False)
    record = AutoConfig.from_pretrained(tmp_path / "out").merge["added_experts"][-1]
    assert record["tolerance"] == 0.5 and record["base_model"]["model"] == "elsewhere"
    # An old checkpoint says where the base was.
    config = json.loads((checkpoint / "config.json").read_text())
    config["merge"]["base_model"]["model"] = str(moved)
    (checkpoint / "config.json").write_text(json.dumps(config))
    add_expert(checkpoint, experts[2], tmp_path / "old", "e2", tolerance=0.5, progress=False)
    assert_same_tensors(load_tensors(tmp_path / "old"), load_tensors(tmp_path / "out"))


# Adapters of the base


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_adapter_of_the_base(merged, tmp_path, family):
    """It is stored as a conversion of the adapter stores it; what it leaves alone is the base's."""
    checkpoint, base, experts = merged(family, grouping={"num_groups": 3})
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    config = LoraConfig(r=3, init_lora_weights=False, target_modules=[target], fan_in_fan_out=family == "gpt2")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "lora")
    result = add_expert(checkpoint, tmp_path / "lora", tmp_path / "out", "lora", base=base, progress=False)
    recipe = json.loads(json.dumps(AutoConfig.from_pretrained(checkpoint).merge["recipe"]))
    recipe["base_model"] = str(base)
    for spec, folder in zip(recipe["experts"], experts):
        spec["model"] = str(folder)
    recipe["experts"].append({"name": "lora", "model": str(tmp_path / "lora")})
    convert(parse_recipe(recipe), tmp_path / "whole", progress=False)
    actual, expected = (exported(tmp_path / name, "lora", tmp_path) for name in ("out", "whole"))
    assert_same_tensors(actual, expected)
    assert result.reused_rows > 0


def test_an_adapter_needs_the_base(merged, tmp_path):
    checkpoint, base, _ = merged()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="the base model is needed .*name it with --base"):
        add_expert(checkpoint, tmp_path / "lora", tmp_path / "out", "lora", progress=False)
    add_expert(checkpoint, tmp_path / "lora", tmp_path / "out", "lora", base=tmp_path / "elsewhere", progress=False)
    assert (tmp_path / "out" / "config.json").exists()


# The router


def test_the_router_keeps_its_choices(merged, tmp_path):
    checkpoint, _, experts = merged()
    train_router(checkpoint)
    add_expert(checkpoint, experts[2], tmp_path / "out", "e2", progress=False)
    before, after = load_tensors(checkpoint), load_tensors(tmp_path / "out")
    for name in ("router.head.weight", "router.head.bias"):
        assert torch.equal(after[name][:2], before[name])
    assert router_tensors(after).keys() == router_tensors(before).keys()
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, tmp_path / "out")]
    prompts = torch.randint(0, 256, (64, 9), generator=torch.Generator().manual_seed(0))
    old, new = (model.route(prompts) for model in models)
    torch.testing.assert_close(new.logits[:, :2], old.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(new.expert_index, old.expert_index) and len(old.expert_index.unique()) == 2
    assert (new.logits[:, 2] <= new.logits[:, :2].mean(1) - ROUTER_MARGIN + 1e-4).all()
    change = new.logits.softmax(-1)[:, :2] - old.logits.softmax(-1)
    assert change.abs().max() < 1 / 20_000


def test_every_part_of_a_router_grows():
    """Whatever adds to the logits has a dimension of experts somewhere; what has none is kept."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "router.head.weight": torch.randn(3, 8, generator=generator),
        "router.head.bias": torch.randn(3, generator=generator),
        "router.words": torch.randn(20, 3, generator=generator),
        "router.scale": torch.randn(8, generator=generator),
    }
    shapes = {"router.head.weight": (4, 8), "router.head.bias": (4,), "router.words": (20, 4), "router.scale": (8,)}
    grown = grow_router(tensors, {name: torch.Size(shape) for name, shape in shapes.items()}, 5.0)

    def logits(tensors, features, words):
        linear = features * tensors["router.scale"] @ tensors["router.head.weight"].T + tensors["router.head.bias"]
        return linear + tensors["router.words"][words].sum(1)

    inputs = 30 * torch.randn(100, 8, generator=generator), torch.randint(0, 20, (100, 6), generator=generator)
    before, after = logits(tensors, *inputs), logits(grown, *inputs)
    torch.testing.assert_close(after[:, :3], before, rtol=0, atol=1e-4)  # a product's last bits follow its width
    torch.testing.assert_close(after[:, 3], before.mean(1) - 5, rtol=1e-4, atol=1e-3)
    assert all(
        torch.equal(grown[name].narrow(dim, 0, 3), tensors[name])
        for name, dim in (("router.head.weight", 0), ("router.head.bias", 0), ("router.words", 1))
    )


def test_the_new_expert_can_be_learnt(merged, tmp_path):
    """A few steps on labelled queries are enough for the router to pick it, and the old ones stay apart."""
    checkpoint, _, experts = merged()
    train_router(checkpoint)
    add_expert(checkpoint, experts[2], tmp_path / "out", "e2", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.freeze_for_router_training()
    prompts = torch.stack([torch.full((6,), token) for token in (10, 90, 200)])
    labels = torch.arange(3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(80):
        model(prompts, expert_labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.route(prompts).expert_index, labels)


def test_an_untrained_router_stays_untrained(merged, tmp_path):
    checkpoint, _, experts = merged()
    add_expert(checkpoint, experts[2], tmp_path / "out", "e2", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.router.is_trained
    assert not any(parameter.any() for parameter in model.router.parameters())


def test_replace_keeps_the_router(merged, tmp_path, caplog):
    checkpoint, _, experts = merged()
    train_router(checkpoint)
    with caplog.at_level(logging.WARNING):
        add_expert(checkpoint, experts[2], tmp_path / "e1", "e1", replace=True, progress=False)
        assert "trunk" not in caplog.text
        add_expert(checkpoint, experts[2], tmp_path / "e0", "e0", replace=True, progress=False)
        assert "'e0' is the router's trunk expert" in caplog.text
    before = load_tensors(checkpoint)
    for name in ("e0", "e1"):
        assert_same_tensors(router_tensors(load_tensors(tmp_path / name)), router_tensors(before))
    prompts = torch.randint(0, 256, (8, 9), generator=torch.Generator().manual_seed(0))
    old, new = (
        AutoModelForCausalLM.from_pretrained(folder).route(prompts) for folder in (checkpoint, tmp_path / "e1")
    )
    assert torch.equal(old.logits, new.logits)


# Vocabularies


def with_tokens(folder, target, tokens, ends=None):
    """A copy of an expert with tokens of its own."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(259 + len(tokens), mean_resizing=False)
    model.generation_config = GenerationConfig(eos_token_id=257 if ends is None else ends)
    tokenizer.chat_template = f"{target.name}: {{{{ messages[0]['content'] }}}}"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture
def union(make_experts, write_recipe, tmp_path):
    """A merged checkpoint of e0 and e1, the second with two tokens of its own, and their folders."""
    base, experts = make_experts("llama", 3, shared=0.4)
    larger = with_tokens(experts[1], tmp_path / "larger", ["<a>", "<b>"], ends=[257, 260])
    recipe = write_recipe(base, [experts[0], larger], tokenizer_source="union", grouping={"num_groups": 2})
    convert(parse_recipe(recipe), tmp_path / "merged", progress=False)
    return tmp_path / "merged", base, [experts[0], larger, experts[2]]


@pytest.mark.parametrize("tokens", [[], ["<b>"], ["<b>", "<a>"]], ids=["base", "some", "all"])
def test_vocabularies_of_a_union(union, tmp_path, tokens):
    """Own ids go to the merged channels of the same tokens; the rest the new expert lacks."""
    checkpoint, _, experts = union
    folder = with_tokens(experts[2], tmp_path / "new", tokens, ends=[5])
    add_expert(checkpoint, folder, tmp_path / "out", "new", progress=False)
    for name in ("e0", "e1"):
        assert_same_tensors(exported(tmp_path / "out", name, tmp_path), exported(checkpoint, name, tmp_path))
    assert_same_tensors(exported(tmp_path / "out", "new", tmp_path), plain_state(folder))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("one" + "".join(tokens), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, expert_index="new").logits[0]
        own = AutoTokenizer.from_pretrained(folder)("one" + "".join(tokens), return_tensors="pt")
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(**own).logits[0]
    channels = model.config.vocabulary_channels("new")
    torch.testing.assert_close(logits[:, channels], expected)
    lacking = sorted(set(range(model.config.vocab_size)) - set(channels))
    assert len(lacking) == 2 - len(tokens) and (logits[:, lacking] == float("-inf")).all()
    assert model.config.expert_eos_token_ids == {"e0": [257], "e1": [257, 260], "new": [5, 257]}
    assert model.generation_config.eos_token_id == [5, 257, 260]
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, chat_template="new", tokenize=False) == "new: hi"
    assert set(tokenizer.chat_template) == {"default", "new"}
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "larger: hi"  # of e1, and so the default
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "experts" / "new").get_vocab().keys() >= {*tokens}
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["vocabulary"]["experts"]
    assert report["new"]["channels_that_it_lacks"] == len(lacking)
    assert report["e1"]["channels_that_only_it_has"] == len(lacking)


def test_chat_templates_of_an_exchanged_expert(make_experts, write_recipe, tmp_path):
    """Its own one goes; that of an expert whose name begins like it stays."""
    base, experts = make_experts("llama", 3)
    folders = [with_tokens(folder, tmp_path / f"own{number}", []) for number, folder in enumerate(experts)]
    recipe = write_recipe(base, folders[:2])
    recipe["experts"][0]["name"], recipe["experts"][1]["name"] = "math", "math-2"
    convert(parse_recipe(recipe), tmp_path / "merged", progress=False)
    add_expert(tmp_path / "merged", folders[2], tmp_path / "out", "math", replace=True, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = {name: text.partition(":")[0] for name, text in named_templates(tokenizer).items()}
    assert written == {"default": "own0", "math": "own2", "math-2": "own1"}


def test_a_token_that_the_union_lacks_is_refused(union, tmp_path):
    checkpoint, _, experts = union
    folder = with_tokens(experts[2], tmp_path / "new", ["<b>", "<other>"])
    with pytest.raises(ValueError, match=r"lacks 1 of its tokens, '<other>': .* needs a new conversion"):
        add_expert(checkpoint, folder, tmp_path / "out", "new", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_base_vocabulary_drops_what_it_lacks(merged, tmp_path, caplog):
    """As a conversion with tokenizer_source base does."""
    checkpoint, _, experts = merged()
    folder = with_tokens(experts[2], tmp_path / "new", ["<other>"])
    with caplog.at_level(logging.WARNING):
        add_expert(checkpoint, folder, tmp_path / "out", "new", progress=False)
    assert "has 1 tokens that the base does not have, their rows are dropped" in caplog.text
    own, kept = plain_state(folder), exported(tmp_path / "out", "new", tmp_path)
    assert torch.equal(kept["lm_head.weight"], own["lm_head.weight"][:259])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_first_expert_that_lacks_a_token(make_experts, write_recipe, tmp_path, tied):
    """Its embedding reads the mean of its rows for that token; others are as they were; exchanged, all is gone."""
    family = "qwen2" if tied else "llama"
    base, experts = make_experts(family, 3, shared=0.4)
    larger = [with_tokens(folder, tmp_path / f"l{number}", ["<a>"]) for number, folder in enumerate(experts)]
    recipe = write_recipe(base, larger[:2], tokenizer_source="union", preset="paper-ties")
    convert(parse_recipe(recipe), tmp_path / "merged", progress=False)
    add_expert(tmp_path / "merged", experts[2], tmp_path / "out", "new", progress=False)
    for name in ("e0", "e1"):
        expected = exported(tmp_path / "merged", name, tmp_path)
        assert_same_tensors(exported(tmp_path / "out", name, tmp_path), expected)
    assert_same_tensors(exported(tmp_path / "out", "new", tmp_path), plain_state(experts[2]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = model.get_input_embeddings()
    rows = embedding.rows.weight[embedding.channel_index[2].long()]
    own = plain_state(experts[2])["model.embed_tokens.weight"]
    torch.testing.assert_close(rows, torch.cat([own, own.mean(0, keepdim=True)]))
    add_expert(tmp_path / "out", larger[2], tmp_path / "back", "new", replace=True, progress=False)
    assert_same_tensors(exported(tmp_path / "back", "new", tmp_path), plain_state(larger[2]))
    rows = load_tensors(tmp_path / "back")["model.model.embed_tokens.rows.weight"]
    with MergedCheckpoint(tmp_path / "back") as checkpoint:
        assert len(rows) == len(layout_rows(checkpoint.channel_index("model.embed_tokens")).row_owners)


# What is written down


def test_what_is_written_down(merged, tmp_path):
    checkpoint, base, experts = merged(num_experts=4, num_merged=2)
    before = json.loads((checkpoint / "conversion_report.json").read_text())
    (experts[2] / "README.md").write_text("---\nlicense: mit\n---\n# An expert\n")
    add_expert(checkpoint, experts[2], tmp_path / "one", "medical", progress=False)
    added = add_expert(tmp_path / "one", experts[3], tmp_path / "two", "law", tolerance=0.9, base=base, progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "two")
    assert config.expert_names == ["e0", "e1", "medical", "law"] and config.num_experts == 4
    assert [record["name"] for record in config.merge["added_experts"]] == ["medical", "law"]
    assert [record["name"] for record in config.merge["experts"]] == ["e0", "e1", "medical", "law"]
    assert config.router == AutoConfig.from_pretrained(checkpoint).router
    report = json.loads((tmp_path / "two" / "conversion_report.json").read_text())
    assert report["relative_errors"].items() >= before["relative_errors"].items()
    assert report["relative_errors"]["medical"] == 0.0 and 0 < report["relative_errors"]["law"] < 0.9
    inspected = inspect_checkpoint(tmp_path / "two")
    assert inspected.parameters == added.parameters == report["parameters"]["stored"]
    assert inspected.expert_parameters == report["parameters"]["experts"]
    assert dict(zip(inspected.expert_names, inspected.relative_errors)) == pytest.approx(
        report["relative_errors"], rel=1e-4
    )
    assert report_tables(inspected)
    for matrix in inspected.matrices:
        assert matrix.rows == report["modules"][matrix.path]["rows"]
        owners = {key.replace(" + ", "+"): count for key, count in matrix.rows_by_owners.items()}
        assert owners == report["modules"][matrix.path]["owners"]
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.count("came after the conversion of this recipe") == card.count("## Limits") == 1
    assert "license: other" in card and "| `medical` | `expert2` | - | mit |" in card
    assert f"| this model | {added.parameters:,} |" in card
    assert (tmp_path / "two" / "experts" / "law" / "generation_config.json").exists()
    assert {file.name for file in (tmp_path / "two").iterdir()} >= {file.name for file in checkpoint.iterdir()}
    check_checkpoint(tmp_path / "two")


def card_facts(folder):
    """The card's table of experts, as rows of cells."""
    card = (folder / "README.md").read_text()
    table = card.split("| expert | model |")[1].split("\n\n")[0].splitlines()[2:]
    return card, [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


@pytest.mark.parametrize("replace", [False, True])
def test_the_card_speaks_of_the_new_model_only(merged, tmp_path, replace, write_jsonl):
    """No evaluation of the old router, no picture that is not there, no number of an expert that left, no path."""
    checkpoint, base, experts = merged()
    rows = [{"text": f"{name} {number}", "expert": name} for name in ("e0", "e1") for number in range(8)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    options = ("--max-steps", "1", "--disable-tqdm", "true", "--use-cpu")
    train_router_of(
        ["--checkpoint", str(checkpoint), "--train-data", data, "--output-dir", str(tmp_path / "routed")] + [*options]
    )
    before, _ = card_facts(tmp_path / "routed")
    assert "evaluation queries to the right expert" in before and "](router_confusion.png)" in before
    assert "model-index:" in before
    name = "e1" if replace else "medical"
    added = add_expert(tmp_path / "routed", experts[2], tmp_path / "out", name, replace=replace, progress=False)
    card, table = card_facts(tmp_path / "out")
    assert card.count("## Router") == 1 and "No evaluation of this model's router is known" in card
    for text in ("evaluation queries", "router_confusion", "router_eval", "model-index", str(tmp_path)):
        assert text not in card, text
    for file in ("router_eval.json", "router_confusion.png"):
        assert (tmp_path / "routed" / file).exists() and not (tmp_path / "out" / file).exists()
    assert [row[:2] for row in table] == [
        ["base", "`base`"],
        ["`e0`", "`expert0`"],
        *([] if replace else [["`e1`", "`expert1`"]]),
        [f"`{name}`", "`expert2`"],
    ]
    assert f"# {len(table) - 1} experts in one model" in card and f"in\n{added.parameters:,} parameters" in card
    assert table[-1][-2:] == ["-", "0.0%"]  # not merged, and exact
    assert f"| `{name}`{' (exchanged)' if replace else ''} | {added.new_rows:,} | {added.reused_rows:,} | 0 |" in card
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file


def test_the_card_of_an_old_report(merged, tmp_path):
    """Older reports have no licences and hold paths: the card's own licence counts for all, and no path is shown."""
    checkpoint, base, experts = merged()
    file = checkpoint / "conversion_report.json"
    report = json.loads(file.read_text())
    del report["cards"], report["parameters"]["indices"]
    report["base_model"]["model"] = report["recipe"]["base_model"] = str(base)
    file.write_text(json.dumps(report))
    (checkpoint / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# An old card\n")
    add_expert(checkpoint, experts[2], tmp_path / "same", "new", progress=False)
    card, table = card_facts(tmp_path / "same")
    assert "license: other" in card and [row[3] for row in table] == ["mit", "mit", "mit", "not stated"]
    assert str(base) not in card and table[0][1] == "`base`"
    (experts[2] / "README.md").write_text("---\nlicense: mit\n---\n")
    add_expert(checkpoint, experts[2], tmp_path / "other", "new", progress=False)
    assert "\nlicense: mit\n" in card_facts(tmp_path / "other")[0]


# Errors


def test_names_are_checked_before_anything_else(merged, tmp_path):
    checkpoint, _, experts = merged()
    for name, keys, message in (
        ("e1", {}, "the checkpoint has an expert 'e1': give another name, or exchange it"),
        ("e7", {"replace": True}, "unknown expert 'e7'"),
        ("7", {}, "expert name '7' must be letters"),
    ):
        with pytest.raises(ValueError, match=message):
            add_expert(checkpoint, experts[2], tmp_path / "out", name, progress=False, **keys)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith((".", "out"))) == []


def test_at_most_62_experts(tmp_path, write_checkpoint):
    names = tuple(f"n{number}" for number in range(62))
    stored = write_checkpoint(tmp_path / "merged", expert_names=names)
    with pytest.raises(ValueError, match="has 62 experts, at most 62 are possible"):
        add_expert(stored.folder, stored.folder, tmp_path / "out", "more", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "expert 'new' is a 'mistral' model, the base is 'llama'"),
        (
            {"rms_norm_eps": 0.5},
            "expert 'new' has rms_norm_eps 0.5, the base has 1e-06: they would compute differently",
        ),
        ({"intermediate_size": 44}, "expert 'new' has intermediate_size 44, the base has 40"),
    ],
)
def test_an_expert_that_computes_differently_is_refused(merged, tmp_path, change, message):
    checkpoint, _, experts = merged()
    file = experts[2] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        add_expert(checkpoint, experts[2], tmp_path / "out", "new", progress=False)


def test_another_base_is_refused(merged, make_experts, tmp_path):
    checkpoint, _, experts = merged()
    other, _ = make_experts("llama", 1, folder=tmp_path / "other", rms_norm_eps=0.5)
    with pytest.raises(ValueError, match="is not the base of .*has rms_norm_eps 0.5"):
        add_expert(checkpoint, experts[2], tmp_path / "out", "new", base=other, progress=False)


def test_wrong_shapes_and_values_are_named(merged, tmp_path):
    checkpoint, _, experts = merged()
    tensors = load_file(experts[2] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value, message in (
        (tensors[name][:-1].clone(), rf"new: {name} has shape \[39, 24\], expected \[40, 24\]"),
        (tensors[name] * float("nan"), f"new: {name} holds NaN or infinity"),
    ):
        save_file(tensors | {name: value}, experts[2] / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            add_expert(checkpoint, experts[2], tmp_path / "out", "new", progress=False)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_name_that_differs_only_in_case_is_refused(merged, tmp_path):
    checkpoint, _, experts = merged()
    with pytest.raises(ValueError, match="'e0', which differs from 'E0' only in case"):
        add_expert(checkpoint, experts[2], tmp_path / "out", "E0", progress=False)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_tolerance_is_a_share(tmp_path, tolerance):
    with pytest.raises(ValueError, match="tolerance is .*, expected a finite number, at least 0"):
        add_expert(tmp_path, tmp_path, tmp_path / "out", "new", tolerance=tolerance)


def test_the_output_folder(merged, tmp_path):
    checkpoint, _, experts = merged()
    for out in (checkpoint, experts[2]):
        with pytest.raises(ValueError, match="is not empty"):
            add_expert(checkpoint, experts[2], out, "new", progress=False)
        with pytest.raises(ValueError, match="that is read: choose another|does not say what was written there"):
            add_expert(checkpoint, experts[2], out, "new", overwrite=True, progress=False)
    add_expert(checkpoint, experts[2], tmp_path / "out", "new", progress=False)
    add_expert(checkpoint, experts[2], tmp_path / "out", "newer", overwrite=True, progress=False)
    assert AutoConfig.from_pretrained(tmp_path / "out").expert_names == ["e0", "e1", "newer"]


def test_a_failure_leaves_nothing(merged, tmp_path, monkeypatch):
    checkpoint, _, experts = merged()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_files", fail)
    with pytest.raises(OSError, match="disk full"):
        add_expert(checkpoint, experts[2], tmp_path / "out", "new", progress=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
