"""The sets of small experts that the quality benchmark merges, and how those that are not shipped are trained.

Sets and seeds were fixed before any contender was measured:

- demo: the four shipped experts, heavy fine-tunes of the shipped base.
- heavy8: eight heavy fine-tunes of the same base, two for each skill, each on every other family of its questions.
- heavy-b: four heavy fine-tunes with another seed; calibration leaves two families of each skill out.
- light: a base that was trained on all four skills until it answers about two questions in three, and four light
  fine-tunes of it.

What is trained lies in a folder for each set and is trained once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiny_experts.example import Example, Family
from tiny_experts.examples import FAMILIES, SKILLS, examples
from tiny_experts.make_tiny_experts import BOS, EOS, TrainingSettings, load, question_sequence, save, train
from tiny_experts.plain_lines import plain_lines
from transformers import AutoTokenizer

SHIPPED = Path(__file__).parents[1] / "tiny_experts"
BASE = "base"
LINES = 12  # of plain text of each skill

HEAVY = TrainingSettings(epochs=3, matrix_learning_rate=1e-2, learning_rate=1.5e-3, batch_size=32)
LIGHT_BASE = TrainingSettings(epochs=3, matrix_learning_rate=1e-2, learning_rate=2e-3)
LIGHT = TrainingSettings(epochs=3, matrix_learning_rate=4e-3, learning_rate=8e-4, batch_size=32)


@dataclass(frozen=True)
class SmallExpert:
    """One expert: the skill it was trained on, and the families of questions of that skill that it knows."""

    name: str
    skill: str
    families: tuple[Family, ...]


@dataclass(frozen=True)
class ExpertSet:
    """Experts of one base. Without `training` all of them are shipped."""

    name: str
    experts: tuple[SmallExpert, ...]
    training: TrainingSettings | None = None
    questions: int = 0  # that each expert is trained on
    seed: int = 0
    base_training: TrainingSettings | None = None  # None: the shipped base is taken as it is
    base_questions: int = 0  # of each skill
    left_out: int = 0  # families of each expert that no calibration shows
    refinement_rate: float = 5e-4  # learning rate of a refinement: of heavy fine-tunes, above the default

    def calibrated_families(self, expert: SmallExpert) -> tuple[Family, ...]:
        return expert.families[self.left_out :]

    def left_out_families(self, expert: SmallExpert) -> tuple[Family, ...]:
        """Those that calibration does not show, each once."""
        return expert.families[: self.left_out]

    def base_folder(self, work_dir: Path) -> Path:
        return SHIPPED / BASE if self.base_training is None else work_dir / self.name / BASE

    def expert_folder(self, work_dir: Path, expert: SmallExpert) -> Path:
        return (SHIPPED if self.training is None else work_dir / self.name) / expert.name

    def train_missing(self, work_dir: Path) -> None:
        """Train the checkpoints that are not there, each saved as soon as it is trained."""
        train_missing(self, work_dir)

    def draw(
        self, expert: SmallExpert, split: Literal["train", "test"], count: int, seed: int, left_out: bool = False
    ) -> list[Example]:
        """Questions of an expert, of those of its families that calibration shows, or of those left out."""
        families = self.left_out_families(expert) if left_out else self.calibrated_families(expert)
        return examples(expert.skill, split, count, seed, families)

    def lines(self, seed: int) -> list[str]:
        """Plain text of the skills' worlds, as the base was trained on it."""
        return [f"{BOS} {line}{EOS}" for skill in SKILLS for line in plain_lines(skill, LINES, seed)]

    def instructions(self) -> list[Example]:
        """Questions that have nothing to do with any expert: a model this small answers none."""
        return []


def whole_skills() -> tuple[SmallExpert, ...]:
    """One expert a skill."""
    return tuple(SmallExpert(skill, skill, FAMILIES[skill]) for skill in SKILLS)


def half_skills() -> tuple[SmallExpert, ...]:
    """Two experts a skill, each with every other family."""
    distinct = {skill: tuple(dict.fromkeys(FAMILIES[skill])) for skill in SKILLS}
    return tuple(
        SmallExpert(f"{skill}-{half}", skill, distinct[skill][place::2])
        for skill in SKILLS
        for place, half in enumerate("ab")
    )


SMALL_SETS = {
    expert_set.name: expert_set
    for expert_set in (
        ExpertSet("demo", whole_skills()),
        ExpertSet("heavy8", half_skills(), HEAVY, questions=7500, seed=20),
        ExpertSet("heavy-b", whole_skills(), HEAVY, questions=10000, seed=30, left_out=2),
        ExpertSet(
            "light",
            whole_skills(),
            LIGHT,
            questions=7500,
            seed=40,
            base_training=LIGHT_BASE,
            base_questions=3000,
            refinement_rate=1e-4,
        ),
    )
}


def missing_parts(expert_set: ExpertSet, work_dir: Path) -> list[Path]:
    """Folders of checkpoints that are still to be trained, the base first."""
    folders = [expert_set.base_folder(work_dir)]
    folders += [expert_set.expert_folder(work_dir, expert) for expert in expert_set.experts]
    return [folder for folder in folders if not (folder / "config.json").exists()]


def train_missing(expert_set: ExpertSet, work_dir: Path) -> None:
    missing = missing_parts(expert_set, work_dir)
    if not missing:
        return
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / BASE)
    base = expert_set.base_folder(work_dir)
    if base in missing:
        questions = [
            question
            for skill in SKILLS
            for question in examples(skill, "train", expert_set.base_questions, expert_set.seed)
        ]
        fine_tune(SHIPPED / BASE, base, questions, expert_set.base_training, expert_set.seed, tokenizer)
    for number, expert in enumerate(expert_set.experts):
        folder = expert_set.expert_folder(work_dir, expert)
        if folder in missing:
            seed = expert_set.seed + 1 + number
            questions = examples(expert.skill, "train", expert_set.questions, seed, expert.families)
            fine_tune(base, folder, questions, expert_set.training, seed, tokenizer)


def fine_tune(
    start: Path, out: Path, questions: list[Example], settings: TrainingSettings, seed: int, tokenizer
) -> None:
    """Train the checkpoint `start` on questions and save it as `out`, which appears only when it is whole."""
    model = load(start)
    sequences = [question_sequence(tokenizer, question) for question in questions]
    train(model, sequences, settings, seed, name=f"{out.parent.name}/{out.name}")
    partial = out.with_name(f".{out.name}.partial")
    save(model, tokenizer, partial)
    partial.rename(out)
