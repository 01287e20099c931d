"""How much each channel of a conversion counts, and in which metric, from a calibration.

Shapes: N experts, O channels, I inputs.
"""

import torch

from conversion.channels.channel_loss import Use, channel_weights, damp_covariances
from conversion.merging.calibration_file import Calibration
from conversion.merging.plan import Plan


class ChannelCosts:
    """Weights and metrics of the channels of a plan.

    Args:
        plan: the checked conversion.
        calibration: of its experts.
        device: where the metrics go.

    Raises:
        ValueError: an expert's texts have no gradient at all.
    """

    def __init__(self, plan: Plan, calibration: Calibration, device: torch.device):
        self._plan, self._calibration, self._device = plan, calibration, device
        sums, channels = torch.zeros(plan.num_experts, dtype=torch.float64), 0
        for path, module in plan.modules.channel.items():
            if module.kind != "embedding":
                sums += calibration.gradient_squares(path).sum(1)
                channels += module.out_features
        self._means = sums / channels
        for name, mean in zip(plan.expert_names, self._means.tolist(), strict=True):
            if mean == 0:
                raise ValueError(f"calibration: no channel of expert {name!r} has a gradient on its texts")
        self._tied = {module.tied_to: path for path, module in plan.modules.channel.items() if module.tied_to}

    def uses(self, path: str) -> list[Use]:
        """How a module's rows are used: as its own, and those of a tied embedding as its head's, too."""
        uses = [self._use(path)]
        if path in self._tied:
            uses.append(self._use(self._tied[path]))
        return uses

    def _use(self, path: str) -> Use:
        weights = channel_weights(self._calibration.gradient_squares(path), self._means)
        weights *= torch.tensor([[expert.weight] for expert in self._plan.recipe.experts], dtype=torch.float64)
        present, covariances = self._plan.present(path), self._calibration.covariance(path)
        return Use(
            weights if present is None else weights * present,
            None if covariances is None else damp_covariances(covariances).to(self._device),
        )
