"""The order of the training images, in updates of images that are all wide or all high, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inputs.sampler import KeyedSampler


@dataclass(frozen=True, kw_only=True)
class GroupedSampler(KeyedSampler):
    """`KeyedSampler` whose updates are each of images of one group, so that little of a padded batch is padding.

    In the epoch's random order each group's images fill updates of their own, which come in the order in which they
    are full; what is left of all groups is mixed at the end.

    Args:
        groups: the group of each sample.
    """

    groups: np.ndarray

    def order(self, epoch: int) -> np.ndarray:
        order = super().order(epoch)
        update = self.batch_size * self.world_size * self.accum_iter
        whole, left = [], []
        for group in np.unique(self.groups):
            places = np.flatnonzero(self.groups[order] == group)
            full = len(places) // update * update
            whole.append(places[:full].reshape(-1, update))
            left.append(places[full:])
        updates = np.concatenate(whole)
        updates = updates[np.argsort(updates[:, -1])]
        return order[np.concatenate([updates.ravel(), np.sort(np.concatenate(left))])]
