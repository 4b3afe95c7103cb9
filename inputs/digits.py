"""scikit-learn's handwritten digits, which need no files."""

import numpy as np

from inputs.dataset_options import DatasetOptions
from inputs.images import ImageDataset, array_dataset


def digits(options: DatasetOptions) -> ImageDataset:
    """1,797 images of 8×8 pixels: 1,437 for training and 360 for validation, stratified by class."""
    from sklearn.datasets import load_digits  # imported here because it takes a second
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(np.arange(len(images)), test_size=360, random_state=0, stratify=found.target)
    chosen = np.sort(split[0 if options.train else 1])
    class_names = [str(name) for name in found.target_names]
    return array_dataset(f"DIGITS/{options.split}", images[chosen], found.target[chosen], class_names)
