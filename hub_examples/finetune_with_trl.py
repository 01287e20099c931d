"""Fine-tune inside a merged model with TRL's SFTTrainer: one expert by a LoRA, or all rows, each text by its expert.

    python hub_examples/finetune_with_trl.py merged texts.jsonl math-lora --expert math
    python hub_examples/finetune_with_trl.py merged texts.jsonl tuned

The texts have `prompt`, `completion` and `expert`, as those of a calibration; the loss is on the completion. A LoRA is
folded in by `channel-merge add-expert merged math-lora fixed --name math --replace`. Stored rows are shared: training
them changes every expert that reads them, so give texts of all.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from conversion.expert_lora import adapt_expert


class ExpertSFTTrainer(SFTTrainer):
    """TRL computes its loss from the head's weight, here rows of all experts; the model's own forward knows whose."""

    compute_loss = Trainer.compute_loss


class WithExperts:
    """A collator that also hands over the column `expert_index`."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return {**self.collator(rows), "expert_index": torch.tensor([row["expert_index"] for row in rows])}


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A text as TRL puts it into the chat template."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def load_texts(file: str, expert: str | None, names: list[str], chat: bool) -> Dataset:
    """The texts of one expert, or of all with the column `expert_index`; those of "*", of nobody, are left out."""
    texts = load_dataset("json", data_files=file, split="train")
    texts = texts.filter(lambda row: row["expert"] in ([expert] if expert else names))
    texts = texts.map(lambda row: {"expert_index": names.index(row["expert"]), **(as_messages(row) if chat else {})})
    return texts.select_columns(["prompt", "completion", "expert_index"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", help="JSONL with prompt, completion and expert")
    parser.add_argument("output_dir")
    parser.add_argument("--expert", help="train a LoRA of this one")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, trust_remote_code=True)
    names = model.config.expert_names
    texts = load_texts(options.data, options.expert, names, chat=bool(tokenizer.chat_template))
    if options.expert:
        model = adapt_expert(model, options.expert, LoraConfig(r=16, lora_alpha=32))
    arguments = SFTConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        remove_unused_columns=False,  # of which expert_index would be one
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=10,
    )
    trainer = ExpertSFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.data_collator = WithExperts(trainer.data_collator)
    trainer.train()
    trainer.save_model()
    print(f"saved to {options.output_dir}")


if __name__ == "__main__":
    main()
