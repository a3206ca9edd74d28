"""Low-shot accuracy: what a few labels per class are worth on frozen features."""

import logging
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.frozen import DEFAULT, FrozenConfig, frozen_features
from cim_models.evaluation.heads import fit_lbfgs
from cim_models.evaluation.protocol import Report, command_of, variant
from cim_models.evaluation.splits import draw_per_class

PROTOCOL = "lowshot-1"
SHARES = (0.01, 0.1)
SHOTS = (1, 5)
DRAWS = 5
STRENGTH = 10.0
"""Of the prior: the penalty is D / (STRENGTH · N), so that before training logits have the variance STRENGTH."""
HEADLINE = "1%"

logger = logging.getLogger(__name__)


def lowshot(
    model: str,
    train: Path,
    val: Path,
    /,
    out: Path = Path("lowshot.json"),
    *,
    weights: str | None = None,
    random_init: bool = False,
    shares: tuple[float, ...] = SHARES,
    shots: tuple[int, ...] = SHOTS,
    draws: int = DRAWS,
    image_size: int | None = None,
    limit_per_class: int | None = None,
    config: FrozenConfig = DEFAULT,
) -> Report:
    """Measures the accuracy of logistic regression on frozen features of a few labelled images.

    Batch normalisation without affine part, then multinomial logistic regression to its optimum, with a penalty that
    depends on the number of features and of images alone, so that nothing is chosen on the images to classify. Each
    number is a mean over several draws of the labelled images.

    Args:
        model: Name of a model or of released weights, a release folder, a run directory, a weights file, or any model
            of timm.
        train: The images to draw from: a folder of class folders, or a file with a line `path,class` for each.
        val: The images to classify, of the same classes, in the same form.
        out: JSON file for the whole protocol and the result.
        weights: A checkpoint file for the architecture that `model` names, of whatever method. `FILE#PREFIX` chooses
            among several encoders in it.
        random_init: Random weights in the same architecture, with the same transform: the baseline to compare with.
        shares: Of the training images of each class, at least one of it. The headline is 1 %.
        shots: Training images of each class; numbers that not all classes have are left out.
        draws: How often the labelled images are drawn.
        image_size: Pixels of the side of what the encoder sees; by default what its weights say.
        limit_per_class: Only the first images of each class, in order of their names, of both splits.
        config: How the encoder is looked at.

    Raises:
        DataError: As `frozen_features`, or if a class has too few images for any of the shots.
        ConfigError: If a setting cannot work.
        WeightsError: If there are no such weights, or they do not fit.
    """
    command = command_of("evaluate lowshot", lowshot, locals())
    if draws < 1 or not all(0 < share <= 1 for share in shares) or not all(n >= 1 for n in shots):
        raise ConfigError(
            f"shares={shares}, shots={shots}, draws={draws}: shares lie in (0, 1], the others are above 0"
        )
    frozen = frozen_features(
        model, train, val, out, config, weights=weights, random_init=random_init, image_size=image_size,
        limit_per_class=limit_per_class,
    )  # fmt: skip

    def measure() -> Report:
        features, labels, classes = frozen.train.features, frozen.train.labels, len(frozen.classes)
        smallest = int(labels.bincount(minlength=classes).min())
        usable = [n for n in shots if n <= smallest]
        if len(usable) < len(shots):
            logger.warning("%s: a class has %d images, so larger numbers of shots are left out", train, smallest)
        budgets: dict[str, float | int] = {f"{100 * share:g}%": float(share) for share in shares}
        budgets |= {f"{n} per class": n for n in usable}
        if not budgets:
            raise DataError(f"{train}: a class has {smallest} images, too few for shots={shots}; give a smaller number")

        penalty_of = features.shape[1] / STRENGTH
        scores: dict[str, list[float]] = {name: [] for name in budgets}
        images: dict[str, int] = {}
        with tqdm(desc="lowshot", total=draws * len(budgets), unit="fit", disable=None) as bar:
            for draw in range(draws):
                for name, count in budgets.items():
                    rows = draw_per_class(labels, count, config.seed * 1000 + draw)
                    images[name] = len(rows)
                    heads = fit_lbfgs(
                        features[rows], labels[rows], classes, penalty_of / len(rows), device=frozen.device
                    )
                    scores[name] += heads.accuracies(frozen.val.features, frozen.val.labels)
                    bar.update()
        return frozen.report(
            out,
            command,
            variant(PROTOCOL, {"draws": DRAWS}, {"draws": draws}),
            settings={
                "normalisation": "batch normalisation without affine, statistics of the drawn images",
                "optimiser": "L-BFGS",
                "penalty": f"features / ({STRENGTH:g} images)",
                "draws": draws,
            },
            result={
                "metric": "top-1",
                "scores": scores,
                "headline": mean(scores[HEADLINE]) if HEADLINE in scores else None,
                "images": images,
            },
        )

    return frozen.processes.by_first(measure)
