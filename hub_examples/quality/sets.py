"""All sets of experts, by name."""

from quality.expert_sets import SMALL_SETS
from quality.real_set import REAL

SETS = SMALL_SETS | {REAL.name: REAL}
