"""The loader serves whatever samples a task has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from inputs.images import BadImage
from inputs.loader import EvalLoader, TrainLoader
from inputs.sampler import KeyedSampler, SampleKey
from inputs.samples import KeyedSamples, collate
from inputs.settings import LoaderSettings
from runtime.processes import Distributed
from utils import UserError


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


class SceneBatch(NamedTuple):
    images: list[torch.Tensor]
    targets: list[dict]
    indices: torch.Tensor


class KeyedScenes(KeyedSamples):
    def read(self, index):
        image, target = self.dataset.load(index)
        jitter = torch.randint(0, 100, ())
        return torch.from_numpy(image).permute(2, 0, 1) + jitter, target

    def collate(self, contents):
        return tuple(map(list, zip(*contents, strict=True)))

    def placement(self, settings):
        def place(content, indices):
            images, targets = content
            return SceneBatch([image.to(settings.dist.device) for image in images], targets, indices)

        return place


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


def settings(workers: int) -> LoaderSettings:
    return LoaderSettings(4, workers, False, Distributed())


def content(batch: SceneBatch) -> tuple:
    return (
        [image.tolist() for image in batch.images],
        [target["id"] for target in batch.targets],
        batch.indices.tolist(),
    )


def scene_loader(workers: int, bad: int | None = None) -> TrainLoader:
    scenes = Scenes(bad)
    return TrainLoader(KeyedScenes(scenes, 1, skip_bad_images=True), GroupedSampler(scenes, 4), settings(workers))


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scene_that_cannot_be_read_is_skipped_and_counted(workers):
    loader, whole = scene_loader(workers, bad=5), scene_loader(0)
    found, expected = ([content(batch) for batch in each.epoch(0)] for each in (loader, whole))
    assert loader.skipped == {"scene 5": "scene 5: torn"}
    assert [a == b for a, b in zip(found, expected, strict=True)].count(False) == 1


def test_every_scene_is_evaluated_once():
    batches = list(EvalLoader(KeyedScenes(Scenes(), seed=0), settings(0)))
    assert [index for batch in batches for index in batch.indices.tolist()] == list(range(24))
    with pytest.raises(BadImage, match="scene 5: torn"):
        list(EvalLoader(KeyedScenes(Scenes(bad=5), seed=0), settings(0)))


def test_the_first_error_among_samples_is_the_batch():
    first, second = UserError("first"), UserError("second")
    assert collate([torch.zeros(2), first, second]) is first
    assert torch.equal(collate([torch.zeros(2), torch.ones(2)]), default_collate([torch.zeros(2), torch.ones(2)]))
    assert collate([1, 2], join=sum) == 3
