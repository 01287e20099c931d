"""Every expert's chat template is in the checkpoint, under its name and with its own special tokens."""

import json

import pytest
from transformers import AutoTokenizer

from conversion.add_expert import add_expert
from conversion.io.model_files import REPORT_FILE
from conversion.merging.plan import make_plan
from conversion.train_router import main as train_router
from conversion.vocabulary.chat_markers import derive_turns
from conversion.vocabulary.merged_vocabulary import with_special_tokens
from modeling_channel_merged import ChannelMergedConfig

from .conftest import BASE_SIZE, BASE_TEMPLATE, CHATML, NAMES, Experts, byte_tokenizer, extended, model_of_size, save


def test_every_chat_template_is_reachable(llama, merged_llama):
    ours = AutoTokenizer.from_pretrained(merged_llama)
    messages = [{"role": "user", "content": "hi"}]

    def text(tokenizer, **keys):
        return tokenizer.apply_chat_template(messages, tokenize=False, **keys)

    assert text(ours) == "[hi]</s>"
    assert text(ours, chat_template="chat") == text(llama.tokenizer("chat")) == "<|im_start|>user\nhi<|im_end|>\n"
    assert text(ours, chat_template="code") == text(llama.tokenizer("code")) == "\n<s>hi</s><fim>"
    # Experts without a template of their own use the default, and have none by their name.
    assert set(ours.chat_template) == {"default", "chat", "code"}
    card = (merged_llama / "README.md").read_text()
    assert (
        "chat template of their own: `chat`, `code`; `tokenizer.apply_chat_template(messages, chat_template=" in card
    )


def test_one_template_of_all_is_a_plain_text(llama, tmp_path):
    """Not a dictionary of one text by many names, which many tools do not read."""
    out = llama.convert(tmp_path / "out", "math", "small")
    assert AutoTokenizer.from_pretrained(out).chat_template == BASE_TEMPLATE
    assert not (out / "additional_chat_templates").exists()
    assert "All experts use the tokenizer's chat template" in (out / "README.md").read_text()


def test_templates_of_an_added_expert(llama, tmp_path):
    """Names of experts that use the default stay theirs, and an old checkpoint's copies of it go."""
    out = llama.convert(tmp_path / "out", "math", "small")
    folder = tmp_path / "mat"
    model_of_size("llama", BASE_SIZE, 7).save_pretrained(folder)
    extended(template={"default": "D", "h": "H"}).save_pretrained(folder)
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "small.jinja").write_text(BASE_TEMPLATE)
    add_expert(out, folder, tmp_path / "larger", "mat", progress=False)
    templates = AutoTokenizer.from_pretrained(tmp_path / "larger").chat_template
    assert templates == {"default": BASE_TEMPLATE, "mat": "D", "mat-h": "H"}
    add_expert(out, llama.base, tmp_path / "same", "mat", progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "same").chat_template == BASE_TEMPLATE
    experts = Experts(llama.base, {"math-pro": llama.folders["math"], "code": llama.folders["code"]})
    extended(template={"default": "D", "pro": "P"}).save_pretrained(folder)
    with pytest.raises(ValueError, match="its chat template would be 'math-pro', and 'math-pro' is there already"):
        add_expert(experts.convert(tmp_path / "pro"), folder, tmp_path / "never", "math", progress=False)


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
    assert set(templates) == {"default", "code"}
    assert templates["default"].endswith(CHATML)


def test_legacy_templates_in_the_tokenizer_config_are_replaced(llama, tmp_path):
    tokenizer = extended(template=BASE_TEMPLATE)
    base = save(model_of_size("llama", BASE_SIZE, 0), None, tmp_path / "base")
    tokenizer.save_pretrained(base, save_jinja_files=False)
    assert "chat_template" in json.loads((base / "tokenizer_config.json").read_text())
    out = Experts(base, llama.folders).convert(tmp_path / "out", "math", "small")
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).chat_template == BASE_TEMPLATE


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


def test_the_config_has_the_markers_of_the_templates_and_the_report_says_where_there_are_none(llama, merged_llama):
    """The base's template, in brackets, cannot be told from ordinary text, and so nothing frames a turn."""
    config, report = (json.loads((merged_llama / name).read_text()) for name in ("config.json", REPORT_FILE))
    assert config["router"].get("turns") is None
    assert {*report["vocabulary"]["chat_turns"]["read_whole"]} == {"default", *NAMES}
    assert "prompts in the chat template `default` whole" in (merged_llama / "README.md").read_text()


def test_markers_are_kept_where_experts_are_added_and_routers_trained(llama, tmp_path):
    base = save(model_of_size("llama", BASE_SIZE, 0), None, tmp_path / "base")
    extended("<|im_start|>", "<|im_end|>", template=CHATML).save_pretrained(base)
    out = Experts(base, llama.folders).convert(tmp_path / "out", "math", "small", tokenizer_source="base")
    turns = ChannelMergedConfig.from_pretrained(out).router["turns"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert turns == derive_turns(tokenizer).turns.to_dict() and len(turns["templates"]) == 1
    assert tokenizer.decode(turns["before"]) == "<|im_start|>user\n"
    # An old checkpoint has none, and gets them.
    config = json.loads((out / "config.json").read_text())
    del config["router"]["turns"]
    (out / "config.json").write_text(json.dumps(config))
    add_expert(out, llama.folders["chat"], tmp_path / "larger", "chat", progress=False)
    assert ChannelMergedConfig.from_pretrained(tmp_path / "larger").router["turns"] == turns
    report = json.loads((tmp_path / "larger" / REPORT_FILE).read_text())
    assert report["vocabulary"]["chat_turns"] == {"read_whole": {}, "read_with_system_prompt": []}
    data = tmp_path / "train.jsonl"
    rows = [{"text": f"{name} {number}", "expert": name} for number in range(4) for name in ("math", "small")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_router(
        [
            *("--checkpoint", str(out), "--train-data", str(data), "--output-dir", str(tmp_path / "routed")),
            *("--disable-tqdm", "true", "--use-cpu", "--num-train-epochs", "1"),
        ]
    )
    assert ChannelMergedConfig.from_pretrained(tmp_path / "routed").router["turns"] == turns
