"""Linear classifiers against scikit-learn, torchmetrics and PyTorch's own layers, on the same features."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchmetrics.functional import accuracy

from cim_models.evaluation import heads as module
from cim_models.evaluation.heads import fit_lbfgs, fit_sgd
from cim_models.evaluation.linear import BATCH, EPOCHS, HELD_OUT, LRS, MOMENTUM
from cim_models.evaluation.splits import hold_out

CLASSES = 10


@pytest.fixture(scope="module")
def clusters():
    """Overlapping classes, whose features have a spectrum as steep as those of encoders: (4000, 48) twice."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (8000,), generator=generator)
    features = 0.4 * torch.randn(CLASSES, 48, generator=generator)[labels] + torch.randn(8000, 48, generator=generator)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q
    features = features / torch.arange(1, 49) @ rotation + 5
    return features[:4000], labels[:4000], features[4000:], labels[4000:]


def test_the_optimum_is_that_of_scikit_learn(clusters, monkeypatch):
    train, train_labels, test, test_labels = clusters
    monkeypatch.setattr(module, "CHUNK", 1500)
    for penalty in (1e-4, 1e-2):
        heads = fit_lbfgs(train, train_labels, CLASSES, penalty)
        reference = make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / (penalty * len(train)), max_iter=5000, tol=1e-8)
        ).fit(train.numpy(), train_labels.numpy())
        expected = torch.from_numpy(reference.predict_proba(test.numpy())).float()
        torch.testing.assert_close(heads(test)[:, 0].softmax(dim=1), expected, atol=5e-3, rtol=0)
        (found,) = heads.accuracies(test, test_labels)
        assert found == pytest.approx(reference.score(test.numpy(), test_labels.numpy()), abs=0.0006)


def test_sgd_agrees_with_scikit_learn_within_half_a_point(clusters):
    """Both choose their setting on the same held-out examples."""
    train, train_labels, test, test_labels = clusters
    kept, held = hold_out(train_labels, HELD_OUT, seed=0)
    options = dict(epochs=EPOCHS, batch_size=BATCH, momentum=MOMENTUM)
    tried = fit_sgd(train[kept], train_labels[kept], CLASSES, LRS, **options).accuracies(
        train[held], train_labels[held]
    )
    lr = LRS[tried.index(max(tried))]
    (found,) = fit_sgd(train, train_labels, CLASSES, (lr,), **options).accuracies(test, test_labels)

    def fitted(rows, C):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500, tol=1e-3))
        return model.fit(train[rows].numpy(), train_labels[rows].numpy())

    best = max((0.03, 0.3, 3.0, 30.0), key=lambda C: fitted(kept, C).score(train[held].numpy(), train_labels[held]))
    expected = fitted(slice(None), best).score(test.numpy(), test_labels.numpy())
    assert 0.4 < expected < 0.95 and found == pytest.approx(expected, abs=0.005)


def test_each_learning_rate_trains_as_if_it_were_alone(clusters):
    train, train_labels = clusters[0][:600], clusters[1][:600]
    options = dict(epochs=3, batch_size=250, momentum=0.9, seed=4)
    together = fit_sgd(train, train_labels, CLASSES, (0.01, 0.1), **options)
    for index, lr in enumerate((0.01, 0.1)):
        alone = fit_sgd(train, train_labels, CLASSES, (lr,), **options)
        torch.testing.assert_close(together.weight[:, index], alone.weight[:, 0])
        torch.testing.assert_close(together.bias[index], alone.bias[0])


def test_a_learning_rate_is_that_of_torch(clusters):
    """The same steps with torch's own modules, normalisation, loss and schedule."""
    train, train_labels = clusters[0][:600], clusters[1][:600]
    found = fit_sgd(train, train_labels, CLASSES, (0.05,), epochs=3, batch_size=250, momentum=0.9, seed=4)
    norm = nn.BatchNorm1d(48, eps=1e-6, affine=False, momentum=1.0)
    norm(train)
    norm.running_var.mul_(599 / 600)
    norm.eval()
    layer = nn.Linear(48, CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=9)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for rows in torch.randperm(600, generator=generator).split(250):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(norm(train[rows])), train_labels[rows]).backward()
            optimiser.step()
            schedule.step()
    torch.testing.assert_close(found.weight[:, 0].T, layer.weight.detach(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.bias[0], layer.bias.detach(), atol=1e-5, rtol=1e-3)


def test_accuracies_are_those_of_torchmetrics(clusters, monkeypatch):
    train, train_labels, test, test_labels = clusters
    monkeypatch.setattr(module, "CHUNK", 1500)
    heads = fit_sgd(train, train_labels, CLASSES, (1e-4, 1e-2), epochs=1, batch_size=BATCH)
    for k in (1, 5):
        for index, found in enumerate(heads.accuracies(test, test_labels, k)):
            logits = heads(test)[:, index]
            expected = accuracy(logits, test_labels, "multiclass", num_classes=CLASSES, top_k=k, average="micro")
            assert found == pytest.approx(float(expected))


def test_a_diverged_classifier_is_worth_nothing_and_leaves_the_others_alone(clusters):
    train, train_labels = clusters[0][:600], clusters[1][:600]
    options = dict(epochs=3, batch_size=200, momentum=0.9)
    heads = fit_sgd(train, train_labels, CLASSES, (0.01, 1e38), **options)
    first, second = heads.accuracies(train, train_labels)
    alone = fit_sgd(train, train_labels, CLASSES, (0.01,), **options)
    assert second == 0 and first == alone.accuracies(train, train_labels)[0] > 0.2


def test_a_constant_feature_does_no_harm(clusters):
    train, train_labels = clusters[0][:300].clone(), clusters[1][:300]
    train[:, 3] = 7.0
    optimum = fit_lbfgs(train, train_labels, CLASSES, 1e-2)
    trained = fit_sgd(train, train_labels, CLASSES, (0.01,), epochs=1, batch_size=BATCH)
    for heads in (optimum, trained):
        assert heads(train).isfinite().all() and heads.accuracies(train, train_labels)[0] > 0.2
