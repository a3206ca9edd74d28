"""Linear probe: what a linear classifier reads off frozen features, its learning rate chosen on training images."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.frozen import DEFAULT, FrozenConfig, frozen_features
from cim_models.evaluation.heads import Heads, fit_lbfgs, fit_sgd
from cim_models.evaluation.protocol import Report, command_of, variant
from cim_models.evaluation.splits import hold_out

PROTOCOL = "linear-1"
QUICK = "linear-lbfgs-1"
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the squared weights, in the quick mode."""
EPOCHS = 100
BATCH = 256
MOMENTUM = 0.9
HELD_OUT = 0.1
"""Share of the training images of each class that the learning rate, or the penalty, is chosen on."""

logger = logging.getLogger(__name__)


def linear(
    model: str,
    train: Path,
    val: Path,
    /,
    out: Path = Path("linear.json"),
    *,
    quick: bool = False,
    weights: str | None = None,
    random_init: bool = False,
    epochs: int = EPOCHS,
    lrs: tuple[float, ...] = LRS,
    image_size: int | None = None,
    limit_per_class: int | None = None,
    config: FrozenConfig = DEFAULT,
) -> Report:
    """Measures the accuracy of a linear classifier on frozen features of labelled images.

    Batch normalisation without affine part, then one linear layer, trained on features without augmentation. A tenth of
    the training images chooses among the learning rates, which are trained all at once; then the chosen one is trained
    on all of them, and the images to classify are looked at once.

    Args:
        model: Name of a model or of released weights, a release folder, a run directory, a weights file, or any model
            of timm.
        train: The images to train on: a folder of class folders, or a file with a line `path,class` for each.
        val: The images to classify, of the same classes, in the same form.
        out: JSON file for the whole protocol and the result.
        weights: A checkpoint file for the architecture that `model` names, of whatever method. `FILE#PREFIX` chooses
            among several encoders in it.
        random_init: Random weights in the same architecture, with the same transform: the baseline to compare with.
        quick: Logistic regression by L-BFGS instead, whose penalty is chosen in the same way: seconds, not minutes.
        epochs: Passes over the training features, of SGD.
        lrs: Learning rates to choose from, of SGD.
        image_size: Pixels of the side of what the encoder sees; by default what its weights say.
        limit_per_class: Only the first images of each class, in order of their names, of both splits.
        config: How the encoder is looked at.

    Raises:
        DataError: As `frozen_features`, or if each class has one training image.
        ConfigError: If a setting cannot work.
        WeightsError: If there are no such weights, or they do not fit.
    """
    command = command_of("evaluate linear", linear, locals())
    if quick and (epochs, lrs) != (EPOCHS, LRS):
        raise ConfigError("epochs and lrs are of SGD, quick is not: leave one of them out")
    if epochs < 1 or not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise ConfigError(f"epochs={epochs}, lrs={lrs}: give at least one epoch and learning rates above 0")
    frozen = frozen_features(
        model, train, val, out, config, weights=weights, random_init=random_init, image_size=image_size,
        limit_per_class=limit_per_class,
    )  # fmt: skip

    def measure() -> Report:
        features, labels, classes = frozen.train.features, frozen.train.labels, len(frozen.classes)
        try:
            kept, held = hold_out(labels, HELD_OUT, config.seed)
        except DataError as error:
            raise DataError(f"{train}: {error}") from error

        def fit(rows: Tensor | slice, grid: Sequence[float]) -> list[Heads]:
            examples = features[rows], labels[rows], classes
            if quick:
                return [fit_lbfgs(*examples, penalty, device=frozen.device) for penalty in grid]
            order: dict[str, Any] = dict(epochs=epochs, batch_size=BATCH, momentum=MOMENTUM, seed=config.seed)
            with tqdm(desc="linear", total=epochs, unit="epoch", disable=None) as bar:
                return [fit_sgd(*examples, grid, **order, device=frozen.device, progress=bar.update)]

        grid = PENALTIES if quick else tuple(sorted(lrs))
        tried = [a for heads in fit(kept, grid) for a in heads.accuracies(features[held], labels[held])]
        chosen = grid[tried.index(max(tried))]
        if len(grid) > 1 and chosen in (grid[0], grid[-1]):
            logger.warning("the best of %s is the outermost, %g: a better one may lie beyond", grid, chosen)
        (heads,) = fit(slice(None), [chosen])
        if not heads.weight.isfinite().all():
            raise ConfigError(f"lrs={grid}: the classifier has diverged with the best of them; give smaller ones")
        tops = (1, 5) if classes > 5 else (1,)
        scores = {f"top-{k}": heads.accuracies(frozen.val.features, frozen.val.labels, k)[0] for k in tops}

        name = "penalty" if quick else "lr"
        sgd = {"epochs": epochs, "lrs": tuple(sorted(lrs))}
        return frozen.report(
            out,
            command,
            QUICK if quick else variant(PROTOCOL, {"epochs": EPOCHS, "lrs": LRS}, sgd),
            settings={
                "normalisation": "batch normalisation without affine, statistics of the training set",
                **(
                    {"optimiser": "L-BFGS", "penalties": PENALTIES}
                    if quick
                    else {"optimiser": "SGD", "momentum": MOMENTUM, "weight_decay": 0, "schedule": "cosine",
                          "batch_size": BATCH, **sgd}
                ),
                "held_out": HELD_OUT,
            },
            result={
                "metric": "accuracy",
                "scores": scores,
                "headline": scores["top-1"],
                name: chosen,
                "held_out_top1": {f"{value:g}": accuracy for value, accuracy in zip(grid, tried, strict=True)},
            },
        )  # fmt: skip

    return frozen.processes.by_first(measure)
