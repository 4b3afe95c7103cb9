"""Order the training images so that an update has only wide or only tall ones."""

from dataclasses import dataclass

import numpy as np

from inputs.sampler import KeyedSampler


@dataclass(frozen=True, kw_only=True)
class GroupedSampler(KeyedSampler):
    """A `KeyedSampler` in which each update has images of a single group, which reduces padding.

    Each group's images fill updates in the epoch's random order, and updates are sorted by when they are complete. The
    remaining images of all groups are mixed at the end.

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
