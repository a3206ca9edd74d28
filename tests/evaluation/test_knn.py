"""kNN against scikit-learn on the same features, and in memory that does not grow with the gallery."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from cim_models.errors import ConfigError
from cim_models.evaluation.knn import KS, TEMPERATURE, knn_accuracy, knn_predict, nearest


@pytest.fixture(scope="module")
def clusters():
    """Features of 7 overlapping classes: training (1500, 32) and test (1100, 32), more than one block of queries."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 32, generator=generator)
    labels = torch.randint(7, (2600,), generator=generator)
    features = centres[labels] + 1.7 * torch.randn(2600, 32, generator=generator)
    return features[:1500], labels[:1500], features[1500:], labels[1500:]


@pytest.mark.parametrize("chunk", [100_000, 1500, 333, 64])
def test_predictions_equal_those_of_scikit_learn(clusters, chunk):
    train, train_labels, test, test_labels = clusters
    predicted = list(knn_predict(train, train_labels, test, KS, TEMPERATURE, chunk))
    accuracies = knn_accuracy(*clusters, KS, TEMPERATURE, chunk)
    for k in KS:
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
        ).fit(train.double().numpy(), train_labels.numpy())
        expected = reference.predict(test.double().numpy())
        assert (torch.cat([block[k] for block in predicted]).numpy() == expected).all()
        assert accuracies[k] == pytest.approx((expected == test_labels.numpy()).mean())
    assert 0.3 < accuracies[20] < 0.95


def test_neighbours_equal_a_full_sort(clusters):
    train, _, test, _ = clusters
    blocks = list(nearest(test, train, 5, chunk=100))
    similarities = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    expected = similarities.topk(5)
    assert [len(block.indices) for block in blocks] == [1024, 76]
    torch.testing.assert_close(torch.cat([block.similarities for block in blocks]), expected.values)
    assert torch.equal(torch.cat([block.indices for block in blocks]), expected.indices)


def test_the_temperature_weighs_the_votes():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([1, 0, 0])
    query = torch.tensor([[1.0, 0.0]])
    for temperature, label in ((0.07, 1), (10.0, 0)):
        (predictions,) = knn_predict(train, labels, query, (1, 3), temperature)
        assert predictions[3].item() == label and predictions[1].item() == 1


@pytest.mark.parametrize("options", [{"ks": (4,)}, {"ks": (0,)}, {"ks": ()}, {"ks": (1,), "temperature": 0.0}])
def test_impossible_settings_are_refused(options):
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ConfigError):
        knn_accuracy(features, labels, features, labels, **options)


MEMORY = """
import resource, sys, torch
from cim_models.evaluation.knn import knn_accuracy

def peak(images, queries):
    # Row i of the gallery begins at number i, so that it takes no memory: what grows is what is computed with it.
    numbers = torch.randn(images + 16, generator=torch.Generator().manual_seed(0))
    gallery, labels = numbers.as_strided((images, 16), (1, 1)), torch.arange(images) % 10
    accuracies = knn_accuracy(gallery, labels, gallery[:queries], labels[:queries], (1, 200), chunk=4096)
    assert accuracies[1] == 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)

print(peak(6144, 1024), peak(61440, 1024))
"""


def test_memory_does_not_grow_with_the_gallery():
    """Ten times the gallery, whose similarities with the queries alone would take 250 MB."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert large - small < 60, f"{small:.0f} MB, then {large:.0f} MB"
