"""Experts of different vocabularies: each keeps its own tokens, padding, tokenizer, chat template and end."""

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conversion.__main__ import main
from conversion.channels.grouping import equal_rows, gram_matrices, group_channels, partition_costs
from conversion.channels.merge_methods import merge_rows
from conversion.channels.row_layout import layout_present, layout_rows
from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.convert import convert
from conversion.export import export_expert
from conversion.generate import answer_prompts
from conversion.merging.block_reader import fill_missing_rows
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.train_router import main as train_router
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer
from conversion.vocabulary.merged_vocabulary import channel_runs, inverse, with_special_tokens
from conversion.vocabulary.prompts import read_conversations
from conversion.vocabulary.union_tokenizer import PIECE_MARK, SAMPLES

FAMILIES = {
    "llama": lambda size: LlamaConfig(**SIZES, vocab_size=size),
    "llama-tied": lambda size: LlamaConfig(**SIZES, vocab_size=size, tie_word_embeddings=True),
}
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
NUM_BASE_TOKENS = 259  # 256 bytes, <s>, </s>, <pad>
BASE_SIZE = 264  # five rows of padding
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
FIM_TEMPLATE = "\n{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}<fim>"
BASE_TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every text is its bytes; three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def extended(
    *tokens: str | AddedToken, eos: str | None = None, template: str | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in tokens])
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def model_of_size(family: str, size: int, seed: int, start: PreTrainedModel | None = None) -> PreTrainedModel:
    """A random model, or one near `start` with as many tokens as they share."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in model.named_parameters() if start is not None else ():
            shared = start.get_parameter(name)[: len(parameter)]
            some = torch.rand(len(shared)) < 0.5  # channels that the fine-tune changed
            parameter[: len(shared)] = torch.where(
                some.view(-1, *[1] * (shared.dim() - 1)), shared + 0.02 * torch.randn_like(shared), shared
            )
    return model


def save(model: PreTrainedModel, tokenizer, folder: Path, eos: int | None = None) -> Path:
    if eos is not None:
        model.config.eos_token_id = eos
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=eos or 257, pad_token_id=258)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Experts:
    """A base and experts of different vocabularies on disk."""

    base: Path
    folders: dict[str, Path]

    def recipe(self, *names: str, **keys):
        names = names or tuple(self.folders)
        return parse_recipe(
            {
                "base_model": str(self.base),
                "experts": [{"name": name, "model": str(self.folders[name])} for name in names],
                **keys,
            }
        )

    def convert(self, out: Path, *names: str, **keys) -> Path:
        keys = {"grouping": {"num_groups": len(names or self.folders)}, "tokenizer_source": "union", **keys}
        convert(self.recipe(*names, **keys), out, progress=False)
        return out

    def dense(self, name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folders[name]).eval()

    def tokenizer(self, name: str):
        return AutoTokenizer.from_pretrained(self.folders[name])


def make(folder: Path, family: str = "llama") -> Experts:
    """A padded base; an expert with its vocabulary; one that uses its padding for tokens; one with the same ids for
    other tokens and no padding; one without padding."""
    base = model_of_size(family, BASE_SIZE, 0)
    tokenizers = {
        "math": extended(template=None),
        "chat": extended("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML),
        "code": extended("[PAD]", AddedToken("<fim>", special=False, normalized=False), template=FIM_TEMPLATE),
        "small": extended(),
    }
    sizes = {"math": BASE_SIZE, "chat": BASE_SIZE, "code": 261, "small": NUM_BASE_TOKENS}
    folders = {
        name: save(
            model_of_size(family, sizes[name], seed, base),
            tokenizers[name],
            folder / name,
            260 if name == "chat" else None,
        )
        for seed, name in enumerate(sizes, start=1)
    }
    return Experts(save(base, extended(template=BASE_TEMPLATE), folder / "base"), folders)


@pytest.fixture(scope="module", params=FAMILIES)
def experts(request, tmp_path_factory) -> Experts:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Experts:
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def merged(experts, tmp_path_factory) -> Path:
    """The union of all of them with as many groups as experts: every row is exact."""
    return experts.convert(tmp_path_factory.mktemp("union") / "merged")


@pytest.fixture(scope="module")
def merged_llama(llama, tmp_path_factory) -> Path:
    return llama.convert(tmp_path_factory.mktemp("union") / "merged")


NAMES = ("math", "chat", "code", "small")
# The merged ids of each expert's own ids: the base's tokens, chat's, code's, and the padding of own ids 259 to 263.
UNION = {
    "math": [*range(259), 263, 264, 265, 266, 267],
    "chat": [*range(259), 259, 260, 265, 266, 267],
    "code": [*range(259), 261, 262],
    "small": [*range(259)],
}


def test_a_union_has_every_token_once(llama):
    vocabulary = make_plan(llama.recipe(tokenizer_source="union")).vocabulary
    assert vocabulary.size == 268
    assert vocabulary.additions == ("<|im_start|>", "<|im_end|>", "[PAD]", "<fim>")
    assert {own.name: numbers.tolist() for own, numbers in zip(vocabulary.experts, vocabulary.channels)} == UNION
    assert vocabulary.base_channels.tolist() == UNION["math"]
    assert [vocabulary.dropped(expert) for expert in range(4)] == [([], 0)] * 4


def test_a_token_that_two_experts_have_is_one(llama, tmp_path):
    """Other ids, the same string: one channel."""
    tokenizer = extended("[X]", "<|im_end|>")
    folders = {**llama.folders, "other": save(model_of_size("llama", 261, 9), tokenizer, tmp_path / "other")}
    vocabulary = make_plan(Experts(llama.base, folders).recipe("chat", "other", tokenizer_source="union")).vocabulary
    assert vocabulary.additions == ("<|im_start|>", "<|im_end|>", "[X]")
    assert vocabulary.channels[1].tolist() == [*range(259), 261, 260]


@pytest.mark.parametrize("name", NAMES)
def test_an_export_of_a_union_is_the_expert(experts, merged, tmp_path, name):
    """K = N: vocabulary, padding, tokenizer, special tokens and every parameter are what went in."""
    export_expert(merged, name, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (experts.folders[name], tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    original = experts.dense(name)
    assert not any(info.values())
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, key) == getattr(original.config, key), key
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id
    own, exported = experts.tokenizer(name), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.get_vocab() == exported.get_vocab()
    assert own.chat_template == exported.chat_template
    assert own.special_tokens_map == exported.special_tokens_map


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_experts_own_and_minus_infinity_elsewhere(experts, merged, name):
    """All of an expert's own ids, padding too, as `expert_index` and as its own model with its own ids."""
    model, dense = AutoModelForCausalLM.from_pretrained(merged).eval(), experts.dense(name)
    channels = torch.tensor(UNION[name])
    own = torch.randint(0, dense.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    own[0, :3] = dense.config.vocab_size - torch.tensor([1, 2, 3])
    with torch.no_grad():
        ours = model(channels[own], expert_index=name).logits
        theirs, truth = dense(own).logits, dense.double()(own).logits
    bound = 2 * (theirs.double() - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (ours[..., channels].double() - truth).abs().max() <= bound
    elsewhere = torch.ones(268, dtype=torch.bool)
    elsewhere[channels] = False
    assert (ours[..., elsewhere] == float("-inf")).all()
    assert ours[..., channels].isfinite().all()


def test_a_mixed_batch_is_its_rows(experts, merged):
    """Rows hold tokens that only their own expert has, and tokens that it has not."""
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    rows = torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(1))
    rows[:, 2], rows[:, 4] = torch.tensor([264, 259, 262, 100]), torch.tensor([260, 262, 267, 259])
    with torch.no_grad():
        mixed = model(rows, expert_index=list(NAMES)).logits
        for row, name in enumerate(NAMES):
            alone = model(rows[row : row + 1], expert_index=name).logits[0]
            truth = model.double()(rows[row : row + 1], expert_index=name).logits[0]
            model.float()
            finite = truth.isfinite()
            assert torch.equal(finite, mixed[row].isfinite()) and torch.equal(finite, alone.isfinite())
            bound = 2 * (alone.double() - truth)[finite].abs().max() + 1e-6 * truth[finite].abs().max()
            assert (mixed[row].double() - truth)[finite].abs().max() <= bound


def test_a_token_that_an_expert_lacks_is_read_as_the_bases_mean(experts, merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    embedding = model.get_input_embeddings()
    base = AutoModelForCausalLM.from_pretrained(experts.base).get_input_embeddings().weight[:NUM_BASE_TOKENS]
    mean = base.double().mean(0).float()
    fallback = embedding.channel_index[NAMES.index("small"), 259].long()
    torch.testing.assert_close(embedding.rows.weight[fallback], mean)
    for expert, name in enumerate(NAMES):
        lacking = [number for number in range(268) if number not in UNION[name]]
        assert (embedding.channel_index[expert, lacking] == fallback).all()
        assert (model.get_output_embeddings().channel_index[expert, lacking] == -1).all()
        assert (embedding.channel_index[expert, UNION[name]] != fallback).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_tokenizer_encodes_as_the_experts_own(llama, merged_llama, name):
    own, ours = llama.tokenizer(name), AutoTokenizer.from_pretrained(merged_llama)
    texts = [*SAMPLES, *(f"a{token} {token}b" for token in own.get_added_vocab())]
    for text in texts:
        for special in (True, False):
            expected = [UNION[name][number] for number in own.encode(text, add_special_tokens=special)]
            assert ours.encode(text, add_special_tokens=special) == expected, text
            assert ours.decode(expected) == own.decode(own.encode(text, add_special_tokens=special))
            assert ours.decode(expected, skip_special_tokens=True) == own.decode(
                own.encode(text, add_special_tokens=special), skip_special_tokens=True
            )
    encoding = json.loads((merged_llama / "conversion_report.json").read_text())["vocabulary"]["experts"][name][
        "encoding"
    ]
    assert encoding["same"] == encoding["samples"] >= len(SAMPLES) and encoding["first_difference"] is None
    assert encoding["same_with_special_tokens"]
    additions = ["<|im_start|>", "<|im_end|>", "[PAD]", "<fim>"]
    assert encoding["foreign_tokens"] == [token for token in additions if token not in own.get_vocab()]


def test_the_report_and_the_card_say_what_became_of_the_vocabularies(merged_llama):
    report = json.loads((merged_llama / "conversion_report.json").read_text())
    vocabulary = report["vocabulary"]
    assert (vocabulary["source"], vocabulary["size"], vocabulary["base_size"]) == ("union", 268, 264)
    chat = vocabulary["experts"]["chat"]
    assert (chat["size"], chat["tokens"]) == (264, 261)
    assert (chat["channels_that_only_it_has"], chat["channels_that_it_lacks"]) == (2, 4)
    assert chat["eos_token_ids"] == [260] and vocabulary["experts"]["math"]["eos_token_ids"] == [257]
    assert report["modules"]["model.embed_tokens"]["fallback_rows"] == 1
    assert "fallback_rows" not in report["modules"]["lm_head"]
    sizes = sum(vocabulary["experts"][name]["size"] for name in NAMES)
    assert sizes == 264 + 264 + 261 + 259
    card = (merged_llama / "README.md").read_text()
    assert "268 tokens (`tokenizer_source: union`" in card
    assert "- `math`: a prompt for it should not hold the others' tokens `<|im_start|>`" in card


def test_parameters_count_every_experts_own_vocabulary(experts, merged):
    report = json.loads((merged / "conversion_report.json").read_text())
    own = sum(sum(p.numel() for p in experts.dense(name).parameters()) for name in NAMES)
    assert report["parameters"]["experts"] == own
    assert report["parameters"]["stored"] == sum(
        value.numel() for key, value in load_file(merged / "model.safetensors").items() if "index" not in key
    ) - 4 * (24 + 1)


def test_inspect_counts_what_the_conversion_counted(experts, merged):
    report = inspect_checkpoint(merged)
    recorded = json.loads((merged / "conversion_report.json").read_text())["parameters"]
    assert (report.parameters, report.expert_parameters) == (recorded["stored"], recorded["experts"])
    assert "nobody" not in report.rows_by_owners


def test_equal_vocabularies_change_nothing(make_experts, write_recipe, tmp_path):
    """A union of the same tokenizers is the base's, file by file."""
    base, folders = make_experts("llama", 2)
    for source in ("base", "union"):
        convert(parse_recipe(write_recipe(base, folders, tokenizer_source=source)), tmp_path / source, progress=False)
    for file in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "base" / file).read_bytes() == (tmp_path / "union" / file).read_bytes()
    assert (tmp_path / "union" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    config = read_merged_config(tmp_path / "union")
    assert config.expert_eos_token_ids is None and config.vocab_size == NUM_BASE_TOKENS
    assert config.expert_vocabularies["e1"]["runs"] == [[0, NUM_BASE_TOKENS]]


def test_a_tokenizer_stays_of_its_class_in_another_folder(make_experts, write_recipe, tmp_path):
    """Transformers takes the class that belongs to the model type, which is another one for the merged model."""
    base, folders = make_experts("qwen2", 2)
    convert(parse_recipe(write_recipe(base, folders)), tmp_path / "out", progress=False)
    original = AutoTokenizer.from_pretrained(base)
    for folder in ("", "experts/e0", "experts/e1"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / folder)
        assert type(tokenizer) is type(original)
        assert tokenizer.get_vocab() == original.get_vocab()
        assert all(tokenizer.encode(text) == original.encode(text) for text in SAMPLES)


# `tokenizer_source: base`


def test_base_names_what_it_drops(llama, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        llama.convert(tmp_path / "out", "math", "chat", "code", tokenizer_source="base")
    # chat's tokens are in the place of padding: their rows stay, their names do not.
    assert "'chat' has 2 tokens that the base's tokenizer calls otherwise" in caplog.text
    assert "'<|im_start|>', '<|im_end|>'" in caplog.text and "'[PAD]', '<fim>'" in caplog.text
    config = read_merged_config(tmp_path / "out")
    assert config.vocab_size == BASE_SIZE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = model(torch.tensor([[1, 2, 3]]), expert_index="code").logits
    assert (logits[..., 261:] == float("-inf")).all() and logits[..., :261].isfinite().all()
    for name in ("math", "chat", "code"):
        export_expert(tmp_path / "out", name, tmp_path / name)
        before, after = (load_file(folder / "model.safetensors") for folder in (llama.folders[name], tmp_path / name))
        for key in before:
            assert torch.equal(before[key], after[key]), (name, key)


def test_base_drops_rows_beyond_its_own(llama, tmp_path, caplog):
    """An expert with more rows than the base: tokens are named, padding is counted, the export has what was kept."""
    added = [f"<extra_{number}>" for number in range(7)]
    folder = save(model_of_size("llama", 270, 7), extended(*added, eos="<extra_6>"), tmp_path / "big", 265)
    experts = Experts(llama.base, {**llama.folders, "big": folder})
    with caplog.at_level(logging.WARNING):
        experts.convert(tmp_path / "out", "math", "big", tokenizer_source="base")
    assert "'big' has 2 tokens that the base does not have, their rows are dropped (tokenizer_source: base): " in (
        caplog.text
    )
    assert "'<extra_5>', '<extra_6>'" in caplog.text
    assert "'big' has 4 padding rows beyond the base's, they are dropped" in caplog.text
    assert "'big' loses its end-of-sequence token: its answers end at the base's" in caplog.text
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["vocabulary"]["experts"]["big"]
    assert report["dropped_tokens"] == ["<extra_5>", "<extra_6>"] and report["dropped_padding_rows"] == 4
    # Its own tokenizer would make tokens that are not there any more: the merged one serves.
    assert not (tmp_path / "out" / "experts" / "big").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    speaker = ExpertTokenizer(tmp_path / "out", read_merged_config(tmp_path / "out"), tokenizer, "big")
    assert speaker.encode("a<extra_6>", chat=True) == tokenizer.encode("[a<extra_6>]</s>")
    assert speaker.decode(tokenizer.encode("so</s>")) == "so"
    export_expert(tmp_path / "out", "big", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.vocab_size == BASE_SIZE
    assert torch.equal(model.lm_head.weight, experts.dense("big").lm_head.weight[:BASE_SIZE])


def test_an_expert_in_another_order_is_merged_by_token(llama, tmp_path):
    """The same strings at other ids: the merged model reads each token at the base's id, the export at its own."""
    tokenizer = byte_tokenizer()
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"] = {token: 255 - number for token, number in values["model"]["vocab"].items()}
    reversed_ = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = model_of_size("llama", NUM_BASE_TOKENS, 8)
    experts = Experts(llama.base, {**llama.folders, "reversed": save(model, reversed_, tmp_path / "reversed")})
    for source in ("base", "union"):
        out = experts.convert(tmp_path / source, "math", "reversed", tokenizer_source=source)
        merged, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
        text = "What is 12 + 30?"
        with torch.no_grad():
            ours = merged(**tokenizer(text, return_tensors="pt"), expert_index="reversed").logits
            theirs = model(**reversed_(text, return_tensors="pt", return_token_type_ids=False)).logits
        torch.testing.assert_close(ours[..., :256], theirs[..., :256].flip(-1), rtol=1e-4, atol=1e-5)
        export_expert(out, "reversed", tmp_path / f"{source}-export")
        state = load_file(tmp_path / f"{source}-export" / "model.safetensors")
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), key


def test_tokens_without_rows_are_named(llama, tmp_path, caplog):
    """A tokenizer that was given a token for which the embedding never got a row."""
    folder = save(model_of_size("llama", NUM_BASE_TOKENS, 7), extended("<lost>"), tmp_path / "lost")
    experts = Experts(llama.base, {**llama.folders, "lost": folder})
    with caplog.at_level(logging.WARNING):
        out = experts.convert(tmp_path / "out", "math", "lost")
    assert "more tokens than its embedding has rows (259), left out are: '<lost>'" in caplog.text
    speaker = ExpertTokenizer(out, read_merged_config(out), AutoTokenizer.from_pretrained(out), "lost")
    with pytest.raises(ValueError, match="expert 'lost' has no row for the token '<lost>'"):
        speaker.encode("a<lost>", chat=False)


def test_an_expert_without_a_tokenizer_uses_the_bases(llama, tmp_path, caplog):
    folder = save(model_of_size("llama", BASE_SIZE, 7), None, tmp_path / "bare")
    experts = Experts(llama.base, {**llama.folders, "bare": folder})
    with caplog.at_level(logging.WARNING):
        vocabulary = make_plan(experts.recipe("chat", "bare", tokenizer_source="union")).vocabulary
    assert "'bare' has no tokenizer: it is taken to use the base's" in caplog.text
    assert vocabulary.channels[1].tolist() == [*range(259), 261, 262, 263, 264, 265]


def test_a_union_needs_the_bases_tokenizer(llama, tmp_path):
    base = save(model_of_size("llama", BASE_SIZE, 0), None, tmp_path / "base")
    with pytest.raises(ValueError, match="tokenizer_source 'union' needs a fast tokenizer of the base"):
        make_plan(Experts(base, llama.folders).recipe(tokenizer_source="union"))


def test_special_tokens_of_the_base_move_with_its_padding(llama, tmp_path):
    """A base that pads with a row that no token names: it is another row once tokens are added."""
    model = model_of_size("llama", BASE_SIZE, 0)
    base = save(model, extended(), tmp_path / "base")
    for file in (base / "config.json", base / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 263}))
    out = Experts(base, llama.folders).convert(tmp_path / "out")
    assert read_merged_config(out).pad_token_id == read_merged_config(out).text_config.pad_token_id == 267
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 267
    # Nobody has that row any more.
    out = Experts(base, llama.folders).convert(tmp_path / "none", "code", "small")
    assert read_merged_config(out).pad_token_id is None
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.pad_token_id is None


# Another segmentation


def words_tokenizer(words: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Bytes and a few merges of them."""
    tokenizer = byte_tokenizer()
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = dict(sorted(values["model"]["vocab"].items(), key=lambda item: item[1]))
    special = [token["content"] for token in values["added_tokens"]]
    for word in [*special, *words]:
        vocab[word] = len(vocab)
    values["model"] |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_an_extended_segmentation(tmp_path):
    """Pieces that only one expert has decode, never match in a text, and the report shows what differs."""
    base_tokenizer = words_tokenizer(["he"], [("h", "e")])
    wide_tokenizer = words_tokenizer(["he", "ll", "hell", "wor"], [("h", "e"), ("l", "l"), ("he", "ll")])
    wide_tokenizer.add_tokens([AddedToken("<cn>", special=True, normalized=False)])
    base = model_of_size("llama", 260, 0)
    experts = Experts(
        save(base, base_tokenizer, tmp_path / "base"),
        {
            "plain": save(model_of_size("llama", 260, 1, base), base_tokenizer, tmp_path / "plain"),
            "wide": save(model_of_size("llama", 264, 2, base), wide_tokenizer, tmp_path / "wide"),
        },
    )
    out = experts.convert(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert read_merged_config(out).vocab_size == 264
    for text in (*SAMPLES, "hello hell wor"):
        assert tokenizer.encode(text) == base_tokenizer.encode(text)
        own = wide_tokenizer.encode(text)
        assert tokenizer.decode(own) == wide_tokenizer.decode(own) == text
    assert PIECE_MARK not in tokenizer.decode(list(range(264)))
    assert tokenizer.encode("<cn>a") == wide_tokenizer.encode("<cn>a")
    report = json.loads((out / "conversion_report.json").read_text())["vocabulary"]["experts"]
    assert report["plain"]["encoding"]["same"] == report["plain"]["encoding"]["samples"]
    wide = report["wide"]["encoding"]
    assert wide["same"] < wide["samples"] and wide["first_difference"]["text"] == "Hello, how are you today?"
    assert wide["first_difference"]["own"] != wide["first_difference"]["merged"]
    assert report["plain"]["encoding"]["foreign_tokens"] == ["<cn>"] and wide["foreign_tokens"] == []
    assert "`wide`: the tokenizer segments otherwise" in (out / "README.md").read_text()
    # The helper reads and writes with the expert's own tokenizer.
    speaker = ExpertTokenizer(out, read_merged_config(out), tokenizer, "wide")
    assert speaker.encode("hello", chat=False) == wide_tokenizer.encode("hello")
    assert speaker.decode(wide_tokenizer.encode("hello")) == "hello"


def sentence_pieces(pieces: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Pieces with marked spaces, and bytes for characters that have no piece, as Llama's and Mistral's tokenizers."""
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", *pieces]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_characters_of_an_extended_segmentation(tmp_path, tokenizer_class):
    """A piece of one character would match in every text: here it decodes, and other experts still read its bytes."""
    base = sentence_pieces(["▁t", "▁th"], [("▁", "t"), ("▁t", "h")])
    merges = [("▁", "t"), ("▁t", "h"), ("你", "好"), ("▁", "中")]
    wide = sentence_pieces(["▁t", "▁th", "你", "好", "你好", "▁中", "中"], merges)
    folders = {}
    for name, tokenizer in (("base", base), ("plain", base), ("wide", wide)):
        folders[name] = save(model_of_size("llama", len(tokenizer), 0), tokenizer, tmp_path / name)
        file = folders[name] / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": tokenizer_class}))
    experts = Experts(folders.pop("base"), folders)
    vocabulary = make_plan(experts.recipe(tokenizer_source="union")).vocabulary
    assert vocabulary.additions == ("你", "好", "你好", "▁中", "中")
    plain, wide, merged = experts.tokenizer("plain"), experts.tokenizer("wide"), vocabulary.tokenizer
    for text in (*SAMPLES, "the 你好 th", "中 好", "你"):
        assert merged.encode(text) == plain.encode(text)
        own = wide.encode(text)
        assert merged.decode(vocabulary.channels[1][own].tolist()) == wide.decode(own)
    assert wide.encode("你好") != merged.encode("你好")
    report = vocabulary.report()["experts"]
    assert report["plain"]["encoding"]["same"] == report["plain"]["encoding"]["samples"]
    assert report["wide"]["encoding"]["same"] < report["wide"]["encoding"]["samples"]
    assert report["wide"]["encoding"]["foreign_tokens"] == report["plain"]["encoding"]["foreign_tokens"] == []


# Merging where not all experts have a channel


def test_one_group_merges_those_that_have_the_token(llama, tmp_path):
    """K = 1, linear: a row is the mean over the experts that have the token; a token of one expert is its own row."""
    out = llama.convert(tmp_path / "out", "math", "chat", "code", grouping={"num_groups": 1})
    tensors = load_file(out / "model.safetensors")
    dense = {name: llama.dense(name).state_dict() for name in ("math", "chat", "code")}
    for module, parameter in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        index = tensors[f"model.{module}.channel_index"].long()
        rows = tensors[f"model.{module}.rows.weight"]
        for channel in range(268):
            owners = [n for n, name in enumerate(dense) if channel in UNION[name]]
            own = [
                dense[name][f"{module}.weight"][UNION[name].index(channel)] for name in dense if channel in UNION[name]
            ]
            if owners:
                assert len({int(index[n, channel]) for n in owners}) == 1, (parameter, channel)
                torch.testing.assert_close(rows[index[owners[0], channel]], torch.stack(own).mean(0))
        assert len(rows) == len({channel for name in dense for channel in UNION[name]}) + (module != "lm_head")


@pytest.mark.parametrize("num_groups", [1, 2])
def test_trimming_counts_only_the_tokens_that_an_expert_has(llama, tmp_path, num_groups):
    """TIES: thresholds of an expert's own deltas; a token that the base lacks differs from the base's mean row."""
    names = ("math", "chat", "code")
    keys = {"merge_method": "ties", "parameters": {"density": 0.4}, "grouping": {"num_groups": num_groups}}
    out = llama.convert(tmp_path / "out", *names, **keys)
    recipe = llama.recipe(*names, **keys)
    base_rows = AutoModelForCausalLM.from_pretrained(llama.base).lm_head.weight.detach()
    base = base_rows[:NUM_BASE_TOKENS].double().mean(0).float().repeat(268, 1)
    base[UNION["math"]] = base_rows
    rows, thresholds = torch.zeros(3, 268, 24), []
    for expert, name in enumerate(names):
        own = llama.dense(name).lm_head.weight.detach()
        rows[expert, UNION[name]] = own
        magnitudes = (own - base[UNION[name]]).abs().flatten().sort(descending=True).values
        thresholds.append(magnitudes[int(0.4 * len(magnitudes)) - 1])
    tensors = load_file(out / "model.safetensors")
    index, stored = tensors["model.lm_head.channel_index"].long(), tensors["model.lm_head.rows.weight"]
    for channel in range(268):
        present = [n for n, name in enumerate(names) if channel in UNION[name]]
        groups = {}
        for expert in present:
            groups.setdefault(int(index[expert, channel]), []).append(expert)
        assert len(groups) <= num_groups
        for row, members in groups.items():
            expected = rows[members[0], channel]
            if any(not torch.equal(expected, rows[member, channel]) for member in members):
                expected = merge_rows(
                    base[channel : channel + 1],
                    rows[members, channel][:, None],
                    torch.ones(len(members)),
                    recipe.method(),
                    thresholds=torch.stack([thresholds[member] for member in members]),
                    keep=None,
                )[0]
            torch.testing.assert_close(stored[row], expected, rtol=1e-6, atol=1e-7)


def test_layout_of_channels_that_not_all_have():
    """As the layout of all channels, without the rows that nobody reads."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 200), generator=generator)
    present = torch.rand(4, 200, generator=generator) < 0.6
    layout = layout_present(labels, present)
    assert torch.equal(layout.channel_index >= 0, present)
    assert len(layout.row_channel) == int(layout.channel_index.max()) + 1
    for expert in range(4):
        rows = layout.channel_index[expert][present[expert]].long()
        assert torch.equal(layout.row_channel[rows], present[expert].nonzero()[:, 0])
        assert ((layout.row_owners[rows] >> expert) & 1).all()
    for channel in range(200):
        for one in range(4):
            for other in range(4):
                if present[one, channel] and present[other, channel]:
                    same = layout.channel_index[one, channel] == layout.channel_index[other, channel]
                    assert same == (labels[one, channel] == labels[other, channel])
    everything = layout_present(labels, torch.ones_like(present))
    assert all(torch.equal(a, b) for a, b in zip(everything, layout_rows(labels)))


def test_missing_rows_are_those_of_another_expert():
    experts = [torch.full((3, 2), float(number)) for number in range(3)]
    present = torch.tensor([[False, False, True], [True, False, False], [True, False, True]])
    fill_missing_rows(experts, torch.full((3, 2), 9.0), present)
    assert [rows[:, 0].tolist() for rows in experts] == [[1, 9, 0], [1, 9, 0], [2, 9, 2]]


@pytest.mark.parametrize("similarity", ["l2", "cosine"])
def test_groups_are_those_of_the_experts_that_have_the_channel(similarity):
    """A stand-in row of weight 0 changes nothing: the groups cost what they cost among the experts that are there."""
    num_experts, generator = 5, torch.Generator().manual_seed(0)
    rows = list(torch.randn(num_experts, 40, 6, generator=generator))
    present = torch.rand(num_experts, 40, generator=generator) < 0.7
    present[:2] = True
    base = torch.zeros(40, 6)
    fill_missing_rows(rows, base, present)
    keys = {"num_groups": 2, "similarity": similarity}
    deltas = torch.stack(rows)
    labels = group_channels(gram_matrices(deltas), equal_rows(deltas), weights=present, **keys)
    for channel in range(40):
        there = present[:, channel]
        alone = deltas[there][:, channel : channel + 1]
        gram = gram_matrices(alone)
        expected = group_channels(gram, equal_rows(alone), **keys)
        _, ours = labels[there][:, channel : channel + 1].unique(return_inverse=True)
        costs = [partition_costs(gram, part, similarity=similarity) for part in (ours, expected)]
        assert costs[0] <= costs[1] * (1 + 1e-9)
        assert len(ours.unique()) == len(expected.unique())


def test_runs_and_inverse():
    channels = torch.tensor([0, 1, 2, 7, 8, 5])
    assert channel_runs(channels) == [[0, 3], [7, 2], [5, 1]]
    assert channel_runs(torch.empty(0, dtype=torch.int64)) == []
    assert inverse(torch.tensor([2, -1, 0]), 4).tolist() == [2, -1, 0, -1]


# Chat templates


def test_every_chat_template_is_reachable(llama, merged_llama):
    ours = AutoTokenizer.from_pretrained(merged_llama)
    messages = [{"role": "user", "content": "hi"}]

    def text(tokenizer, **keys):
        return tokenizer.apply_chat_template(messages, tokenize=False, **keys)

    assert text(ours) == "[hi]</s>"
    assert text(ours, chat_template="chat") == text(llama.tokenizer("chat")) == "<|im_start|>user\nhi<|im_end|>\n"
    assert text(ours, chat_template="code") == text(llama.tokenizer("code")) == "\n<s>hi</s><fim>"
    # Experts without a template of their own get the default.
    assert text(ours, chat_template="math") == text(ours, chat_template="small") == "[hi]</s>"
    assert set(ours.chat_template) == {"default", *NAMES}


def test_a_template_keeps_its_own_special_tokens():
    """`{{ eos_token }}` is the expert's, also where the merged tokenizer has another; other texts stay as they are."""
    template = "\n {{ eos_token }}{{ bos_token }}|"
    changed = with_special_tokens(
        template, {"eos_token": '<"end">', "pad_token": "x"}, {"eos_token": "</s>", "bos_token": "<s>"}
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = changed
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == '\n <"end">|'
    assert with_special_tokens(template, {"eos_token": "</s>"}, {"eos_token": "</s>"}) == template


def test_the_first_experts_template_is_the_default_where_the_base_has_none(llama, tmp_path):
    base = save(model_of_size("llama", BASE_SIZE, 0), extended(), tmp_path / "base")
    out = Experts(base, llama.folders).convert(tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert templates["default"] == templates["chat"]
    assert templates["default"].endswith(CHATML)


def test_legacy_templates_in_the_tokenizer_config_are_replaced(llama, tmp_path):
    tokenizer = extended(template=BASE_TEMPLATE)
    base = save(model_of_size("llama", BASE_SIZE, 0), None, tmp_path / "base")
    tokenizer.save_pretrained(base, save_jinja_files=False)
    assert "chat_template" in json.loads((base / "tokenizer_config.json").read_text())
    out = Experts(base, llama.folders).convert(tmp_path / "out", "math", "small")
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).chat_template == dict.fromkeys(
        ("default", "math", "small"), BASE_TEMPLATE
    )


def test_an_experts_named_templates_are_kept_under_its_name(llama, tmp_path):
    folder = tmp_path / "tools"
    model_of_size("llama", BASE_SIZE, 7).save_pretrained(folder)
    extended(template={"default": "D", "tool_use": "T"}).save_pretrained(folder)
    out = Experts(llama.base, {**llama.folders, "tools": folder}).convert(tmp_path / "out", "math", "tools")
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert (templates["tools"], templates["tools-tool_use"], templates["default"]) == ("D", "T", BASE_TEMPLATE)


def test_an_expert_must_not_be_called_as_a_template_of_the_base(llama):
    experts = Experts(llama.base, {"default": llama.folders["math"], "chat": llama.folders["chat"]})
    with pytest.raises(ValueError, match="expert 'default' has the name of a chat template of the base"):
        make_plan(experts.recipe())


@pytest.mark.parametrize(("first", "second"), [("math-pro", "math"), ("math", "math-pro"), ("Math-PRO", "math")])
def test_two_templates_never_share_a_file(llama, tmp_path, first, second):
    """The template "pro" of an expert "math" would be the file of an expert "math-pro"."""
    folder = tmp_path / "pro"
    model_of_size("llama", BASE_SIZE, 7).save_pretrained(folder)
    extended(template={"default": "D", "pro": "P"}).save_pretrained(folder)
    folders = {name: folder if name == "math" else llama.folders["chat"] for name in (first, second)}
    with pytest.raises(ValueError, match="its chat template would be '[Mm]ath-(pro|PRO)', and '.*' is there already"):
        make_plan(Experts(llama.base, folders).recipe())


# End of sequence


class Say(LogitsProcessor):
    """Makes every query say its script, whatever the model thinks of it; a script of its own for every sequence."""

    def __init__(self, scripts: list[list[int]], prompt_length: int):
        self.scripts, self.prompt_length = scripts, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, -1e4)
        for row in range(len(scores)):
            script = self.scripts[row * len(self.scripts) // len(scores)]
            forced[row, script[min(step, len(script) - 1)]] = 0
        return forced


SCRIPTS = [[1, 257, 2, 3, 4], [1, 257, 2, 260, 4], [1, 260, 2, 3, 257]]  # of math, chat, math
ENDED = [[1, 257], [1, 257, 2, 260], [1, 260, 2, 3, 257]]


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
def test_each_row_stops_at_its_own_experts_end(merged_llama, options):
    """The other expert's end of sequence ends nothing; rows that are done are padded."""
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    assert sorted(model.generation_config.eos_token_id) == [257, 260]
    assert model.config.expert_eos_token_ids == {"math": [257], "chat": [260], "code": [257], "small": [257]}
    prompts = torch.tensor([[5, 6], [5, 6], [5, 6]])
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        expert_index=["math", "chat", "math"],
        max_new_tokens=5,
        logits_processor=LogitsProcessorList([Say(SCRIPTS, 2)]),
        **options,
    )
    copies = options.get("num_return_sequences", 1)
    longest = max(map(len, ENDED))
    expected = [[5, 6, *end, *[258] * (longest - len(end))] for end in ENDED for _ in range(copies)]
    assert sequences.tolist() == expected


def test_another_end_of_sequence_given_to_generate_is_that_of_all_rows(merged_llama):
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    prompts = torch.tensor([[5, 6], [5, 6]])
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        expert_index=["math", "chat"],
        max_new_tokens=5,
        eos_token_id=3,
        logits_processor=LogitsProcessorList([Say([[1, 257, 3, 4, 4], [1, 260, 4, 3, 4]], 2)]),
    )
    assert sequences.tolist() == [[5, 6, 1, 257, 3, 258], [5, 6, 1, 260, 4, 3]]


def test_an_end_that_all_experts_share_is_that_of_the_model(llama, tmp_path):
    """Experts that all left the base's end of sequence: theirs is the model's, and needs no table."""
    tokenizer = extended("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    folders = {
        name: save(model_of_size("llama", 261, seed), copy.deepcopy(tokenizer), tmp_path / name, 260)
        for seed, name in enumerate(("a", "b"))
    }
    out = Experts(llama.base, folders).convert(tmp_path / "out")
    config = read_merged_config(out)
    assert config.expert_eos_token_ids is None and config.eos_token_id == 260
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 260


# Answers


@pytest.mark.parametrize("source", ["union", "base"])
def test_an_expert_answers_as_it_did_alone(llama, tmp_path, source):
    """Messages and texts in one mixed batch: each answer is what the expert's own model says to its own rendering."""
    out = llama.convert(tmp_path / "out", "math", "chat", "code", tokenizer_source=source)
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    for name in ("math", "chat", "code"):
        tokenizer, model = llama.tokenizer(name), llama.dense(name)
        (answer,) = answer_prompts(out, [messages], expert=name, max_new_tokens=12)
        rendering = AutoTokenizer.from_pretrained(llama.base) if name == "math" else tokenizer
        text = rendering.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True), name
        (alone,) = answer_prompts(out, ["What is 12 + 30?"], expert=name, max_new_tokens=12)
        assert alone.text == answer.text


def test_routing_reads_the_default_template(llama, merged_llama, monkeypatch):
    """The router sees what it was trained on, whichever expert is picked in the end."""
    import conversion.generate as room

    seen = []
    encode = room.encode_prompts
    monkeypatch.setattr(room, "encode_prompts", lambda *args: seen.append(encode(*args)) or seen[-1])
    answers = answer_prompts(merged_llama, ["hi", [{"role": "user", "content": "ho"}]], max_new_tokens=2)
    assert [answer.expert for answer in answers] == ["math", "math"] and answers[0].probability is not None
    tokenizer = AutoTokenizer.from_pretrained(merged_llama)
    assert tokenizer.batch_decode(seen[0]["input_ids"]) == ["[hi]</s>", "[ho]</s>"]


def test_messages_need_a_template(llama, tmp_path):
    with pytest.raises(ValueError, match="messages need a chat template"):
        base = save(model_of_size("llama", BASE_SIZE, 0), extended(), tmp_path / "base")
        out = Experts(base, llama.folders).convert(tmp_path / "out", "math", "small")
        answer_prompts(out, [[{"role": "user", "content": "hi"}]])


def test_conversations_from_the_command_line(merged_llama, tmp_path, capsys):
    file = tmp_path / "conversations.jsonl"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    file.write_text(json.dumps({"messages": turns}) + "\n\n" + json.dumps({"messages": turns[:1]}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(
            ["generate", str(merged_llama), "so", "--messages", str(file), "--max-new-tokens", "2", "--expert", "chat"]
        )
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert [line for line in lines if line.startswith("[chat given]")] == [
        f"[chat given] {q}" for q in ("so", "he", "hi")
    ]
    assert read_conversations(file) == [turns, turns[:1]]
    file.write_text(json.dumps({"messages": turns}) + '\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match="conversations.jsonl, line 2: expected"):
        read_conversations(file)
    with pytest.raises(ValueError, match="there is no prompt to answer"):
        answer_prompts(merged_llama, [])


# What depends on the vocabulary elsewhere


def test_chunks_and_shards_change_nothing(llama, tmp_path):
    """The mean row, thresholds and groups of channels that not all have do not depend on how the data come."""
    recipe = llama.recipe(preset="paper-ties", tokenizer_source="union", grouping={"num_groups": 2})
    convert(recipe, tmp_path / "whole", progress=False)
    convert(recipe, tmp_path / "chunks", progress=False, chunk_bytes=4000)
    whole, chunks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "chunks"))
    assert whole.keys() == chunks.keys()
    assert all(torch.equal(whole[key], chunks[key]) for key in whole)


def test_a_trained_router_keeps_the_experts_files(merged_llama, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{n} {name}", "expert": name}) + "\n" for n in range(4) for name in NAMES)
    )
    train_router(
        [
            "--checkpoint",
            str(merged_llama),
            "--train-data",
            str(data),
            "--output-dir",
            str(tmp_path / "out"),
            "--use-cpu",
        ]
        + ["--max-steps", "1", "--disable-tqdm", "true"]
    )
    before, after = ({f.relative_to(d) for f in d.glob("experts/*/*")} for d in (merged_llama, tmp_path / "out"))
    assert before == after and Path("experts/chat/tokenizer.json") in after
    old, new = read_merged_config(merged_llama), read_merged_config(tmp_path / "out")
    assert old.expert_vocabularies == new.expert_vocabularies and old.expert_eos_token_ids == new.expert_eos_token_ids
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates == AutoTokenizer.from_pretrained(merged_llama).chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(model.generation_config.eos_token_id) == [257, 260]


# PEFT 0.21 still asks Transformers by the deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_beside_a_larger_vocabulary(llama, tmp_path):
    """A LoRA expert has the base's vocabulary, which the union moves as it does the base's."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama.base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "lora")
    out = Experts(llama.base, {"chat": llama.folders["chat"], "lora": tmp_path / "lora"}).convert(tmp_path / "out")
    assert read_merged_config(out).vocabulary_channels("lora") == [*range(259), 261, 262, 263, 264, 265]
    export_expert(out, "lora", tmp_path / "export")
    state = load_file(tmp_path / "export" / "model.safetensors")
    for key, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-7)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == BASE_TEMPLATE


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
own = AutoTokenizer.from_pretrained(sys.argv[1], subfolder="experts/chat")
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="chat", tokenize=False)
inputs = tokenizer([text, text], add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
logits = model(**inputs, expert_index=["chat", "math"]).logits
sequences = model.generate(**inputs, expert_index=["chat", "math"], max_new_tokens=20)
torch.save((inputs["input_ids"], own(text)["input_ids"], logits, sequences), sys.argv[2])
"""


def test_a_fresh_offline_process_without_this_package(merged_llama, tmp_path, without_package):
    """Tokenizer, templates, logits and ends are all in the checkpoint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", without_package + REMOTE, merged_llama, tmp_path / "out.pt"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    input_ids, own_ids, logits, sequences = torch.load(tmp_path / "out.pt")
    assert input_ids[0].tolist() == [UNION["chat"][number] for number in own_ids]
    model = AutoModelForCausalLM.from_pretrained(merged_llama).eval()
    keys = {"attention_mask": torch.ones_like(input_ids), "expert_index": ["chat", "math"]}
    with torch.no_grad():
        assert torch.equal(model(input_ids, **keys).logits, logits)
    assert torch.equal(model.generate(input_ids, max_new_tokens=20, **keys), sequences)
