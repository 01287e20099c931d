"""One tokenizer for all: the base's, with the tokens of every expert; exports and logits are the experts' own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.convert import convert
from conversion.export import export_expert
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer
from conversion.vocabulary.union_tokenizer import PIECE_MARK, SAMPLES

from .conftest import BASE_SIZE, NAMES, NUM_BASE_TOKENS, UNION, Experts, byte_tokenizer, extended, model_of_size, save


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


def test_a_union_needs_the_bases_tokenizer(llama, tmp_path):
    base = save(model_of_size("llama", BASE_SIZE, 0), None, tmp_path / "base")
    with pytest.raises(ValueError, match="tokenizer_source 'union' needs a fast tokenizer of the base"):
        make_plan(Experts(base, llama.folders).recipe(tokenizer_source="union"))


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
    speaker = ExpertTokenizer.of_checkpoint(out, read_merged_config(out), tokenizer, "wide")
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
