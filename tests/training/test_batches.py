from __future__ import annotations

import pytest
import torch

from prunesweep.training.batches import EpochBatches, own_share
from prunesweep.training.world import World


def drawn(seed: int, world: World, **options: int) -> list[list[int]]:
    batches = EpochBatches(22, 8, world, **options)
    batches.start(seed)
    return list(batches)


def flat(lists: list[list[int]]) -> list[int]:
    return [item for part in lists for item in part]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_share_the_batches_that_one_would_see(size: int, accumulate: int) -> None:
    alone = drawn(3, World())
    shares = [drawn(3, World(rank, size), accumulate=accumulate) for rank in range(size)]
    assert len(alone) == 2
    assert all(len(share) == 2 * accumulate for share in shares)
    for i, batch in enumerate(alone):
        pieces = [piece for share in shares for piece in share[i * accumulate : (i + 1) * accumulate]]
        assert all(len(piece) == 8 // size // accumulate for piece in pieces)
        assert sorted(flat(pieces)) == sorted(batch)


def test_order_follows_the_seed() -> None:
    assert drawn(1, World()) == drawn(1, World())
    assert drawn(1, World()) != drawn(2, World())


def test_an_epoch_has_no_image_twice_but_with_repeats() -> None:
    once = flat(drawn(5, World()))
    assert len(set(once)) == len(once) == 16
    repeated = flat(drawn(5, World(), repeats=2))
    assert len(repeated) == 16
    assert torch.tensor(repeated).bincount().max() == 2
    assert len(set(repeated)) == 8
    first, second = (flat(drawn(5, World(rank, 2), repeats=2)) for rank in range(2))
    assert set(first) == set(second)  # views of an image go to different workers


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_shares_have_every_image_once(size: int) -> None:
    shares = [own_share(10, World(rank, size)) for rank in range(size)]
    assert sorted(flat(shares)) == list(range(10))
