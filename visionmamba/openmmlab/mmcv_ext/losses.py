"""Focal losses (Lin et al. 2017), in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]


def _class_weight(target: torch.Tensor, weight: torch.Tensor | None, num_classes: int) -> torch.Tensor | float:
    """Weight of each sample's class; the background class (``num_classes``) weighs 1."""
    if weight is None or weight.numel() == 0:
        return 1.0
    return F.pad(weight, (0, 1), value=1.0)[target.clamp(0, num_classes)]


def _widened(input: torch.Tensor) -> torch.Tensor:
    """Return logits in at least float32."""
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _positive(target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Whether each class is each sample's own ``(N, C)``: of none, where the target is out of their range."""
    return target.unsqueeze(1) == torch.arange(num_classes, device=target.device)


def _per_sample(weight: torch.Tensor | float) -> torch.Tensor | float:
    return weight.unsqueeze(1) if isinstance(weight, torch.Tensor) else weight


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    """Write the loss of logits ``(N, C)`` for integer targets in 0 .. C (C: background) into ``output`` (N, C)."""
    positive = _positive(target, input.shape[1])
    x = _widened(input)
    p = torch.sigmoid(x)
    loss = torch.where(
        positive, -alpha * (1 - p) ** gamma * F.logsigmoid(x), -(1 - alpha) * p**gamma * F.logsigmoid(-x)
    )
    output.copy_(loss * _per_sample(_class_weight(target, weight, input.shape[1])))


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    """Write the derivative of each loss by its logit into ``grad_input`` (N, C)."""
    positive = _positive(target, input.shape[1])
    x = _widened(input)
    p = torch.sigmoid(x)
    gradient = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * F.logsigmoid(x)),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * F.logsigmoid(-x) - p),
    )
    grad_input.copy_(gradient * _per_sample(_class_weight(target, weight, input.shape[1])))


def _target_probability(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    chosen = probability.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    return chosen.clamp(min=torch.finfo(probability.dtype).tiny)


def softmax_focal_loss_forward(input, target, weight, output, gamma, alpha):
    """Write the loss of probabilities ``(N, C)`` into ``output`` (N,); negative targets are ignored."""
    p = _target_probability(input, target)
    loss = -alpha * (1 - p) ** gamma * p.log() * _class_weight(target, weight, input.shape[1])
    output.copy_(torch.where(target >= 0, loss, torch.zeros_like(loss)))


def softmax_focal_loss_backward(input, target, weight, buff, grad_input, gamma, alpha):
    """Write the derivative of each loss by the logits into ``grad_input`` (N, C)."""
    p = _target_probability(input, target)
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # its power below is negative for gamma < 1
    factor = -alpha * (rest**gamma - gamma * rest ** (gamma - 1) * p * p.log())
    buff.copy_(factor * _class_weight(target, weight, input.shape[1]) * (target >= 0))
    grad_input.copy_(buff.unsqueeze(1) * (_positive(target, input.shape[1]).to(input) - input))
