"""Linear classifiers on frozen features: many at once by gradient descent, or one to its optimum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16384
"""Rows of features that are on the device at a time."""
EPSILON = 1e-6
"""Of the normalisation's variance."""


@dataclass
class Heads:
    """L linear classifiers behind one normalisation: batch normalisation without affine part.

    As the features do not change, the statistics are those of the whole training set, not of batches.
    """

    mean: Tensor
    """(D,) of the training features."""
    variance: Tensor
    """(D,), biased as in batch normalisation."""
    weight: Tensor
    """(D, L, C)."""
    bias: Tensor
    """(L, C)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (B, L, C) of features (B, D)."""
        features = features.to(self.mean.device, torch.float32)
        normalised = (features - self.mean) * (self.variance + EPSILON).rsqrt()
        return (normalised @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def accuracies(self, features: Tensor, labels: Tensor, k: int = 1) -> list[float]:
        """Share of examples whose label is among the k first, of each classifier; 0 for one that has diverged."""
        hits = torch.zeros(len(self.bias), device=self.mean.device)
        for rows, right in zip(features.split(CHUNK), labels.to(self.mean.device).split(CHUNK), strict=True):
            logits = self(rows)
            among = (logits.topk(k, dim=2).indices == right[:, None, None]).any(dim=2)
            hits += (among & logits.isfinite().all(dim=2)).sum(dim=0)
        return (hits / len(features)).tolist()


def fit_sgd(
    features: Tensor,
    labels: Tensor,
    classes: int,
    lrs: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    momentum: float = 0.9,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> Heads:
    """Trains one classifier per learning rate, all on the same batches, by SGD from zero weights, cosine schedule.

    A loss that is weighted with a classifier's learning rate gives it that learning rate, so one optimiser serves all.

    Args:
        features: (N, D) float, of which only a chunk is on the device at a time.
        labels: (N,) int64 in [0, classes).
        classes: Their number, C.
        lrs: The L learning rates at the start.
        epochs: Passes over the features.
        batch_size: Examples of a step; the last step of a pass has what is left.
        momentum: Of the optimiser.
        seed: Of the order.
        device: Where to compute.
        progress: Called after each pass.
    """
    heads = _zeros(features, len(lrs), classes, device)
    rates = torch.tensor(lrs, device=heads.mean.device)
    parameters = [heads.weight.requires_grad_(), heads.bias.requires_grad_()]
    optimiser = torch.optim.SGD(parameters, lr=1.0, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    step, steps = 0, epochs * math.ceil(len(features) / batch_size)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for rows in order.split(max(1, CHUNK // batch_size) * batch_size):
            chunk = (x[rows].to(rates.device).split(batch_size) for x in (features, labels))
            for examples, right in zip(*chunk, strict=True):
                optimiser.param_groups[0]["lr"] = 0.5 + 0.5 * math.cos(math.pi * step / steps)
                targets = right[:, None].expand(-1, len(lrs))
                losses = F.cross_entropy(heads(examples).flatten(0, 1), targets.flatten(), reduction="none")
                optimiser.zero_grad()
                (losses.view(len(right), -1).mean(dim=0) @ rates).backward()
                optimiser.step()
                step += 1
        progress()
    return _done(heads)


def fit_lbfgs(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    *,
    iterations: int = 300,
    device: torch.device | str = "cpu",
) -> Heads:
    """Fits multinomial logistic regression: mean cross-entropy + penalty / 2 · ‖weights‖², on normalised features.

    scikit-learn calls this `LogisticRegression(C=1 / (penalty * N))` behind a `StandardScaler`.

    Args:
        features: (N, D) float, of which only a chunk is on the device at a time.
        labels: (N,) int64 in [0, classes).
        classes: Their number, C.
        penalty: Of the squared weights, not of the biases; at least 0.
        iterations: At most; it ends earlier at the optimum.
        device: Where to compute.
    """
    if len(features) <= CHUNK:  # else they move again for every look at them
        features, labels = features.to(device), labels.to(device)
    heads = _zeros(features, 1, classes, device)
    parameters = [heads.weight.requires_grad_(), heads.bias.requires_grad_()]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimiser.zero_grad()
        regularised = penalty / 2 * heads.weight.square().sum()
        regularised.backward()
        total = regularised.item()
        for rows, right in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            loss = F.cross_entropy(heads(rows)[:, 0], right.to(heads.mean.device), reduction="sum") / len(features)
            loss.backward()
            total += loss.item()
        return total

    optimiser.step(closure)
    return _done(heads)


def _zeros(features: Tensor, count: int, classes: int, device: torch.device | str) -> Heads:
    """Untrained classifiers, with the statistics of the features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    for rows in features.split(CHUNK):
        total += rows.to(device, torch.float64).sum(dim=0)
    mean = total / len(features)
    squares = torch.zeros_like(mean)
    for rows in features.split(CHUNK):
        squares += (rows.to(device, torch.float64) - mean).square().sum(dim=0)
    return Heads(
        mean.float(),
        (squares / len(features)).float(),
        torch.zeros(len(mean), count, classes, device=device),
        torch.zeros(count, classes, device=device),
    )


def _done(heads: Heads) -> Heads:
    return Heads(heads.mean, heads.variance, heads.weight.detach(), heads.bias.detach())
