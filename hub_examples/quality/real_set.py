"""The set of experts on a real base: four fine-tunes of a chat model of 135M parameters, made once."""

from pathlib import Path
from typing import Literal

from real_experts.make_real_experts import BASE, make_missing
from real_experts.skills import FAMILIES, SKILLS, skill_examples
from real_experts.unrelated_texts import INSTRUCTIONS, PROSE
from tiny_experts.example import Example

from quality.expert_sets import ExpertSet, SmallExpert


class RealSet(ExpertSet):
    def base_folder(self, work_dir: Path) -> Path:
        return work_dir / self.name / BASE

    def expert_folder(self, work_dir: Path, expert: SmallExpert) -> Path:
        return work_dir / self.name / expert.name

    def train_missing(self, work_dir: Path) -> None:
        make_missing(work_dir / self.name)

    def draw(
        self, expert: SmallExpert, split: Literal["train", "test"], count: int, seed: int, left_out: bool = False
    ) -> list[Example]:
        families = self.left_out_families(expert) if left_out else self.calibrated_families(expert)
        return skill_examples(expert.skill, split, count, seed, families)

    def lines(self, seed: int) -> list[str]:
        return list(PROSE)

    def instructions(self) -> list[Example]:
        return list(INSTRUCTIONS)


REAL = RealSet("real", tuple(SmallExpert(skill, skill, FAMILIES[skill]) for skill in SKILLS), refinement_rate=2e-5)
