"""How much each channel of a conversion counts, and in which metric, from a calibration.

Shapes: N experts, O channels, I inputs.
"""

from typing import NamedTuple

import torch

from conversion.channels.channel_loss import (
    EMBEDDING_GAIN,
    blend_with_identity,
    channel_weights,
    damp_covariances,
    metric_factor,
)
from conversion.merging.calibration_file import Calibration
from conversion.merging.plan import Plan


class ModuleLoss(NamedTuple):
    """What a change of one module's rows costs."""

    path: str
    weights: torch.Tensor  # (N, O) float64: how much each expert's channel counts, 0 where it has no such channel
    covariances: torch.Tensor | None  # (N, I, I) float32, of mean diagonal 1 and damped; None: the identity
    bias_weight: float  # of a bias: its input is 1, the others are scaled to 1

    def mean_metric(self) -> torch.Tensor | None:
        """The L of the metric L L^T that the channels are compared in, (I, I) float32; None: the identity.

        Raises:
            ValueError: it cannot be made of what was measured.
        """
        if self.covariances is None:
            return None
        try:
            return metric_factor(self.covariances)
        except ValueError as error:
            raise ValueError(f"calibration of {self.path}: {error}") from None


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

    def of_module(self, path: str) -> ModuleLoss:
        """Weights and metrics of one module."""
        plan, head = self._plan, self._tied.get(path)
        covariances, bias_weight = self._calibration.covariance(head or path), 1.0
        weights = torch.zeros(plan.num_experts, plan.modules.channel[path].out_features, dtype=torch.float64)
        if plan.modules.channel[path].kind == "embedding":
            weights += EMBEDDING_GAIN * self._weights(path)
        if covariances is not None:
            scales = damp_covariances(covariances)
            outputs = self._weights(head or path) * scales[:, None]
            weights += outputs
            if head is not None:
                blend_with_identity(covariances, float(outputs.sum() / weights.sum()))
            covariances, bias_weight = covariances.to(self._device), float((1 / scales).mean())
        weights *= torch.tensor([[expert.weight] for expert in plan.recipe.experts], dtype=torch.float64)
        present = plan.present(path)
        return ModuleLoss(path, weights if present is None else weights * present, covariances, bias_weight)

    def _weights(self, path: str) -> torch.Tensor:
        return channel_weights(self._calibration.gradient_squares(path), self._means)
