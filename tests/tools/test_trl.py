"""TRL's SFTTrainer with the model's own loss trains one expert or many; without it, an error says what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.expert_lora import adapt_expert

from .conftest import NAMES

trl = pytest.importorskip("trl", reason="needs trl: make test-tools")

pytestmark = [
    # PEFT 0.21 and TRL 1.16 still ask Transformers by deprecated names.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

TEXTS = [
    {"prompt": "two plus two", "completion": " four", "expert": "math"},
    {"prompt": "a loop", "completion": " for x in y", "expert": "code"},
    {"prompt": "the court", "completion": " rules", "expert": "law"},
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "hub_examples")
    import finetune_with_trl

    return finetune_with_trl


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def make_trainer(kind, model, folder, tmp_path, **arguments):
    rows = [{**text, "expert_index": NAMES.index(text["expert"])} for text in TEXTS]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=3,
        learning_rate=0.03,
        max_steps=12,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(folder)
    return kind(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


@torch.no_grad()
def completion_loss(model, folder, experts) -> float:
    """Mean over the tokens of all completions, each text by its expert, computed text by text."""
    tokenizer, losses = AutoTokenizer.from_pretrained(folder), []
    for text, expert in zip(TEXTS, experts, strict=True):
        prompt, whole = (
            tokenizer(part)["input_ids"] for part in (text["prompt"], text["prompt"] + text["completion"])
        )
        whole = torch.tensor([[*whole, tokenizer.eos_token_id]])
        scores = model(whole, expert_index=expert).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-scores.gather(1, whole[0, len(prompt) :, None])[:, 0])
    return torch.cat(losses).mean().item()


def test_one_expert(example, merged, tmp_path):
    """Its adapter learns the completions; the other experts stay bit for bit."""
    plain = load(merged)
    model = adapt_expert(load(merged), "math", LoraConfig(r=8, lora_alpha=32))
    trainer = make_trainer(example.ExpertSFTTrainer, model, merged, tmp_path)
    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(completion_loss(plain, merged, ["math"] * 3), rel=1e-4)
    trainer.train()
    model.eval()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.1 and last == pytest.approx(completion_loss(model, merged, ["math"] * 3), rel=1e-4)
    for name in ("code", "law"):
        assert completion_loss(model, merged, [name] * 3) == completion_loss(plain, merged, [name] * 3)


def test_all_experts_by_a_column(example, merged, tmp_path):
    """Each text is its own expert's: its loss is, and the rows that learn from it."""
    model, names = load(merged), [text["expert"] for text in TEXTS]
    trainer = make_trainer(example.ExpertSFTTrainer, model, merged, tmp_path, remove_unused_columns=False)
    trainer.data_collator = example.WithExperts(trainer.data_collator)
    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(completion_loss(model, merged, names), rel=1e-4)
    assert first != pytest.approx(completion_loss(model, merged, ["math"] * 3), rel=1e-4)
    trainer.train()
    model.eval()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.5 and last == pytest.approx(completion_loss(model, merged, names), rel=1e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_the_plain_trainer_says_what_to_do(merged, tmp_path, adapted):
    """It would score a head that is that of no expert."""
    model = load(merged)
    if adapted:
        model = adapt_expert(model, "math", LoraConfig(r=2))
    trainer = make_trainer(trl.SFTTrainer, model, merged, tmp_path)
    with pytest.raises(RuntimeError, match="give a subclass of it `compute_loss = Trainer.compute_loss`"):
        trainer.train()


@pytest.mark.parametrize("expert", ["math", None])
def test_the_example(example, merged, tmp_path, monkeypatch, capsys, expert):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS * 4))
    command = [str(merged), str(tmp_path / "texts.jsonl"), str(tmp_path / "out"), "--max-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["finetune_with_trl.py", *command, *(["--expert", expert] if expert else [])])
    example.main()
    assert f"saved to {tmp_path / 'out'}" in capsys.readouterr().out
    if expert:
        adapt_expert(load(merged), tmp_path / "out")
    else:
        assert type(load(tmp_path / "out")).__name__ == "ChannelMergedForCausalLM"
