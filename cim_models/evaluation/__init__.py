"""Is the encoder any good? Features, and what they are worth to neighbours, linear classifiers and few labels."""

from cim_models.evaluation.correlation import correlation
from cim_models.evaluation.embed import embed, load_features
from cim_models.evaluation.features import extract, extract_all, pool
from cim_models.evaluation.finetune import FinetuneConfig, finetune
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.knn import knn
from cim_models.evaluation.linear import linear
from cim_models.evaluation.locate import locate
from cim_models.evaluation.lowshot import lowshot
from cim_models.evaluation.quickstart import quickstart
from cim_models.evaluation.report import report
from cim_models.evaluation.segment import SegmentConfig, segment
from cim_models.evaluation.segmenters import Segmenter, load_segmenter

__all__ = [
    "FinetuneConfig",
    "FrozenConfig",
    "SegmentConfig",
    "Segmenter",
    "correlation",
    "embed",
    "extract",
    "extract_all",
    "finetune",
    "knn",
    "linear",
    "load_features",
    "load_segmenter",
    "locate",
    "lowshot",
    "pool",
    "quickstart",
    "report",
    "segment",
]
