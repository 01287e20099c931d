"""Write the demo's calibration texts, `calibration.jsonl`: train questions of every skill with their answers.

Run it in the folder `hub_examples`:

    python -m tiny_experts.make_calibration
"""

import json
from pathlib import Path

from tiny_experts.examples import SKILLS, examples

TEXTS = 500  # of each skill
SEED = 7  # not one that the experts' own training questions were drawn with


def main() -> None:
    file = Path(__file__).parent / "calibration.jsonl"
    rows = [
        {"prompt": example.prompt, "completion": example.completion, "expert": skill}
        for skill in SKILLS
        for example in examples(skill, "train", TEXTS, SEED)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
