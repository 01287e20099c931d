"""Where the calibration of a conversion comes from: a file that was measured before, or texts that are measured now.

Both are checked before weights are read, but for the pieces of them that tell a calibration file whose it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.io.journal import Journal
from conversion.io.sources import identity
from conversion.merging.calibration_file import Calibration, read_calibration
from conversion.merging.calibration_memory import CalibrationMemory, plan_calibration
from conversion.merging.plan import Plan


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration of the plan's experts."""

    calibration: Calibration
    identity: Any  # plain values that tell it from others
    disk_bytes: int = 0

    @property
    def texts(self) -> dict[str, int]:
        """How many texts each expert was measured on."""
        return self.calibration.texts

    def open(self, journal: Journal, device: torch.device, progress: bool) -> Calibration:
        return self.calibration


@dataclass(frozen=True)
class CalibrationData:
    """Texts to measure the plan's experts on."""

    plan: Plan
    data: str
    rows: list[Any]  # `CalibrationText`
    memory: CalibrationMemory
    identity: Any

    @property
    def texts(self) -> dict[str, int]:
        """How many texts each expert will be measured on."""
        numbers = [text.expert for text in self.rows]
        return {name: numbers.count(number) for number, name in enumerate(self.plan.expert_names)}

    @property
    def disk_bytes(self) -> int:
        """What is measured lies on the disk until the conversion is done."""
        return self.memory.disk_bytes

    def open(self, journal: Journal, device: torch.device, progress: bool) -> Calibration:
        """Measure what the journal does not have yet; its parts are read where they lie.

        Raises:
            ValueError: the device has too little memory, or a value is not finite, with the module.
        """
        from conversion.merging.calibration import measure_calibration

        return measure_calibration(
            self.plan, self.rows, self.data, self.memory, journal, device=device, progress=progress
        )


def find_calibration(plan: Plan, max_memory: int, threads: int) -> CalibrationFile | CalibrationData | None:
    """What the recipe says of a calibration, checked; None without one.

    Args:
        max_memory: bytes that measuring may use beside one expert's weights.
        threads: the most threads of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is of other experts or damaged; texts are not as they must be, or the memory is too small.
    """
    given = plan.recipe.calibration
    if given is None:
        return None
    if given.file is not None:
        file = plan.recipe.folder / Path(given.file).expanduser()
        return CalibrationFile(read_calibration(file, plan), identity(file, True))
    # Here, for its library of data sets is slow to load and of no use to other conversions.
    from conversion.merging.calibration import longest_text, read_texts, texts_hash
    from conversion.merging.places import find_texts

    data = find_texts(plan.recipe)
    rows = read_texts(plan, data)
    return CalibrationData(
        plan, data, rows, plan_calibration(plan, max_memory, threads, longest_text(rows)), texts_hash(rows)
    )
