"""Is the encoder any good? Features, nearest neighbours, and a first look at both."""

from cim_models.evaluation.correlation import correlation
from cim_models.evaluation.embed import embed, load_features
from cim_models.evaluation.features import extract, extract_all, pool
from cim_models.evaluation.knn import knn
from cim_models.evaluation.locate import locate
from cim_models.evaluation.quickstart import quickstart

__all__ = [
    "correlation",
    "embed",
    "extract",
    "extract_all",
    "knn",
    "load_features",
    "locate",
    "pool",
    "quickstart",
]
