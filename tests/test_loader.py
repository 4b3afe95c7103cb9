"""The loader serves whatever samples a task has."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from inputs.images import BadImage
from inputs.loader import Batch, EvalLoader, KeyedSamples, TrainLoader
from inputs.sampler import KeyedSampler, SampleKey
from runtime.processes import Distributed


@dataclass(frozen=True)
class Scenes:
    """Images of two shapes, each with as many boxes as its number says."""

    bad: int | None = None  # cannot be read

    def __len__(self) -> int:
        return 24

    def path(self, index: int) -> str:
        return f"scene {index}"

    def load(self, index: int) -> tuple[np.ndarray, dict]:
        if index == self.bad:
            raise BadImage(f"{self.path(index)}: torn")
        size = (8, 12) if self.wide(index) else (12, 8)
        return np.full((*size, 3), index, np.uint8), {"boxes": np.zeros((index % 3, 4)), "id": index}

    def wide(self, index: int) -> bool:
        return index % 2 == 0


class KeyedScenes(KeyedSamples):
    def read(self, index):
        image, target = self.dataset.load(index)
        jitter = torch.randint(0, 100, ())
        return Batch(torch.from_numpy(image).permute(2, 0, 1) + jitter, target, index)

    def collate(self, samples):
        images, targets, indices, *_ = zip(*samples, strict=True)
        return Batch(list(images), list(targets), torch.tensor(indices))


@dataclass(frozen=True)
class GroupedSampler:
    """Whole batches of one aspect ratio."""

    dataset: Scenes
    batch_size: int

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[SampleKey]]:
        order = KeyedSampler(len(self.dataset), self.batch_size, seed=0).order(epoch)
        groups = [[int(i) for i in order if self.dataset.wide(int(i)) == wide] for wide in (True, False)]
        for step in range(start_step, len(self)):
            group, start = groups[step % 2], step // 2 * self.batch_size
            yield [SampleKey(epoch, index, 0) for index in group[start : start + self.batch_size]]


def content(batch: Batch) -> tuple:
    return (
        [image.tolist() for image in batch.images],
        [target["id"] for target in batch.targets],
        batch.indices.tolist(),
    )


def scene_loader(workers: int, bad: int | None = None) -> TrainLoader:
    scenes = Scenes(bad)
    return TrainLoader(KeyedScenes(scenes, 1, skip_bad_images=True), GroupedSampler(scenes, 4), Distributed(), workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_images_of_many_sizes_in_an_order_of_their_own(workers):
    loader = scene_loader(workers)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 6
    for step, batch in enumerate(batches):
        assert [target["id"] for target in batch.targets] == batch.indices.tolist()
        assert [len(target["boxes"]) for target in batch.targets] == [index % 3 for index in batch.indices.tolist()]
        assert {tuple(image.shape) for image in batch.images} == {(3, 12, 8) if step % 2 else (3, 8, 12)}
    assert [content(batch) for batch in scene_loader(0).epoch(0, 2)] == [content(batch) for batch in batches[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_scene_that_cannot_be_read_is_skipped_and_counted(workers):
    loader, whole = scene_loader(workers, bad=5), scene_loader(0)
    found, expected = ([content(batch) for batch in each.epoch(0)] for each in (loader, whole))
    assert loader.skipped == {"scene 5": "scene 5: torn"}
    assert [a == b for a, b in zip(found, expected, strict=True)].count(False) == 1


def test_every_scene_is_evaluated_once():
    batches = list(EvalLoader(KeyedScenes(Scenes(), seed=0), 4, Distributed()))
    assert [index for batch in batches for index in batch.indices.tolist()] == list(range(24))
    with pytest.raises(BadImage, match="scene 5: torn"):
        list(EvalLoader(KeyedScenes(Scenes(bad=5), seed=0), 4, Distributed()))
