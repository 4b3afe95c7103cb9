"""Training and evaluation loaders for detectors: images of any size with their objects."""

import argparse
from collections.abc import Sequence

import torch
from torchvision.transforms import v2

from detection.coco import NUCLEI, CocoImages, open_split
from detection.sampler import GroupedSampler
from detection.transforms import TrainTransform
from inputs.images import ImageDataset
from inputs.loader import Batch, EvalLoader, KeyedSamples, TrainLoader
from runtime.processes import Distributed
from utils import UserError


class DetectionSamples(KeyedSamples):
    """Images with their objects after a `TrainTransform`, or, without a transform, images only."""

    def read(self, index: int) -> Batch:
        if self.transform is None:
            return Batch(v2.functional.pil_to_tensor(self.dataset.image(index)), {}, index)
        return Batch(*self.transform(*self.dataset.load(index)), index)

    def collate(self, samples: Sequence[Batch]) -> Batch:
        images, targets, indices, *_ = zip(*samples, strict=True)
        return Batch(list(images), list(targets), torch.tensor(indices))


def build_data(args: argparse.Namespace, dist: Distributed, masks: bool) -> tuple[TrainLoader, EvalLoader]:
    """Build the training and validation loaders.

    Raises:
        UserError: if the splits have different categories, there is nothing to train on, or an update needs more images
            than there are; see also `open_split`.
    """
    path = args.data_path or NUCLEI
    train_set, val_set = (open_split(path, split, masks) for split in ("train", "val"))
    if (train_set.category_ids, train_set.class_names) != (val_set.category_ids, val_set.class_names):
        raise UserError(f"--data-path {path}: the categories of training and validation differ")
    if train_set.objects == 0:
        raise UserError(f"{train_set.file}: it has no object to train on (crowds and boxes without area do not count)")
    update = (args.batch_size, args.seed, dist.rank, dist.world_size, args.accum_iter)
    sampler = GroupedSampler(len(train_set), *update, groups=train_set.groups)
    samples = DetectionSamples(train_set, TrainTransform(args), seed=args.seed, skip_bad_images=args.skip_bad_images)
    train = TrainLoader(samples, sampler, dist, args.num_workers, args.pin_mem)
    return train, build_eval_loader(val_set, args, dist)


def build_eval_loader(
    dataset: CocoImages | ImageDataset, args: argparse.Namespace, dist: Distributed, skip_bad_images: bool = False
) -> EvalLoader:
    """Build a loader with batch size 1, because padding an image in a batch changes its predictions."""
    samples = DetectionSamples(dataset, skip_bad_images=skip_bad_images, replacements=0)
    return EvalLoader(samples, 1, dist, args.num_workers, args.pin_mem)
