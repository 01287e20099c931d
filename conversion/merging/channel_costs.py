"""How much each channel of a conversion counts, and in which metric, from a calibration.

Shapes: N experts, O channels, I inputs.
"""

from typing import NamedTuple

import torch

from conversion.channels.channel_loss import (
    DAMPING,
    EMBEDDING_DAMPING,
    channel_weights,
    damp_covariances,
    metric_factor,
)
from conversion.merging.calibration_file import Calibration
from conversion.merging.plan import Plan


class MeanMetric(NamedTuple):
    """In which metric the rows of one module are compared: the mean of the experts' own."""

    factor: torch.Tensor  # (I, I) float32: the metric is L L^T
    bias_weight: float  # of a bias: its input is 1, the others are scaled to 1


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

    def weights(self, path: str) -> torch.Tensor:
        """How much each expert's channel counts: (N, O) float64, 0 where it has no such channel."""
        squares = self._calibration.gradient_squares(path)
        if self._plan.modules.channel[path].kind == "embedding":
            squares = squares * self._plan.modules.channel[path].in_features  # their sum over the hidden size
        if path in self._tied:
            squares = squares + self._calibration.gradient_squares(self._tied[path])
        weights = channel_weights(squares, self._means)
        weights *= torch.tensor([[expert.weight] for expert in self._plan.recipe.experts], dtype=torch.float64)
        present = self._plan.present(path)
        return weights if present is None else weights * present

    def covariances(self, path: str) -> torch.Tensor | None:
        """The experts' damped H of a module: (N, I, I) float32; None: the identity, an embedding's."""
        measured = self._damped(path)
        return None if measured is None else measured[0].to(self._device)

    def mean_metric(self, path: str) -> MeanMetric | None:
        """The metric that a module's channels are compared in; None: the identity, an embedding's.

        Raises:
            ValueError: it cannot be made of what was measured.
        """
        measured = self._damped(path)
        if measured is None:
            return None
        covariances, scales = measured
        try:
            return MeanMetric(metric_factor(covariances.to(self._device)), float((1 / scales).mean()))
        except ValueError as error:
            raise ValueError(f"calibration of {path}: {error}") from None

    def _damped(self, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Damped covariances (N, I, I), and what each was divided by (N,); a tied embedding has those of its head."""
        covariances = self._calibration.covariance(self._tied.get(path, path))
        if covariances is None:
            return None
        damping = EMBEDDING_DAMPING if path in self._tied else DAMPING
        return covariances, damp_covariances(covariances, damping)
