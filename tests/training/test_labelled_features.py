"""Features measured by labels: the vote of neighbours, the probe, and what cannot be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from prunesweep.models import UserError
from prunesweep.training.labelled_features import QUALITIES, knn_answers, labelled_top1, probe_answers


def clouds(seed: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds of three classes, some channels of which say nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (images,), generator=generator)
    noise = torch.randn(images, 6, generator=generator)
    return 3 * torch.eye(3, 6)[labels] + noise * torch.tensor([1.5, 1.5, 1.5, 1, 1, 9]), labels


def test_neighbours_vote_by_cosine() -> None:
    bank, labels = clouds(0, 300)
    queries, _ = clouds(1, 200)

    def weights(distances: Any) -> Any:
        return torch.exp(-torch.as_tensor(distances) / 0.07).numpy()

    peer = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute").fit(bank.numpy(), labels)
    assert torch.equal(knn_answers(bank, labels, queries), torch.from_numpy(peer.predict(queries.numpy())))
    assert torch.equal(knn_answers(3 * bank, labels, 0.1 * queries), knn_answers(bank, labels, queries))
    assert knn_answers(bank[:2], torch.tensor([4, 1]), bank[:2]).tolist() == [4, 1]  # fewer images than neighbours


def test_the_probe_is_logistic_regression() -> None:
    bank, labels = clouds(0, 300)
    queries, wanted = clouds(1, 400)
    found = probe_answers(1e3 * bank + 5, labels, 1e3 * queries + 5)
    peer = LogisticRegression(C=1.0).fit((bank / bank.std(0)).numpy(), labels)
    same = torch.from_numpy(peer.predict((queries / bank.std(0)).numpy())) == found
    assert float(same.double().mean()) > 0.95
    assert float((found == wanted).double().mean()) > 0.8
    assert probe_answers(bank[:3], labels[:3], queries).shape == (400,)


class Few:
    """Six training images of two classes, and two validation images, one without a label."""

    info: Any = type("Info", (), {"labelled": True})()
    train_images = 6

    def plain_loader(self, images: Any, batch_size: int) -> Any:
        x = torch.tensor([[1.0, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-0.1, 1]])
        return [(x[list(images)], torch.tensor([0, 0, 0, 1, 1, 1]))]

    def val_loader(self, batch_size: int) -> Any:
        return [(torch.tensor([[2.0, 0.1], [0, 3]]), torch.tensor([0, -1]))]


@pytest.mark.parametrize("quality", QUALITIES)
def test_images_without_a_label_do_not_count(quality: str) -> None:
    model: Any = torch.nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    found = labelled_top1(model, Few(), quality)  # type: ignore[arg-type]
    assert found == {f"{quality}_top1": 100.0, "images": 1}
    model.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="training split gives features that are no numbers"):
        labelled_top1(model, Few(), quality)  # type: ignore[arg-type]
