"""Write the demo's calibration texts, `calibration.jsonl`: train questions of every skill with their answers.

Most are for the expert of their skill, and some for every expert: how it goes on elsewhere is to stay, too.

Run it in the folder `hub_examples`:

    python -m tiny_experts.make_calibration
"""

import json
from pathlib import Path

from conversion.vocabulary.calibration_texts import EVERY_EXPERT
from tiny_experts.examples import SKILLS, examples

TEXTS = 400  # of each skill, for its expert
GENERAL_TEXTS = 25  # of each skill, for every expert
SEED = 7  # not one that the experts' own training questions were drawn with


def main() -> None:
    file = Path(__file__).parent / "calibration.jsonl"
    rows = [
        {
            "prompt": example.prompt,
            "completion": example.completion,
            "expert": skill if number < TEXTS else EVERY_EXPERT,
        }
        for skill in SKILLS
        for number, example in enumerate(examples(skill, "train", TEXTS + GENERAL_TEXTS, SEED))
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
