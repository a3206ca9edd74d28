"""Is the encoder any good? Features, nearest neighbours, and a first look at both."""

from .embed import embed, load_features
from .features import extract, extract_all, pool
from .knn import evaluate_knn, knn
from .locate import locate
from .quickstart import quickstart

__all__ = ["embed", "evaluate_knn", "extract", "extract_all", "knn", "load_features", "locate", "pool", "quickstart"]
