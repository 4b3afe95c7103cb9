"""The order of the training images: each update has only wide or only tall ones."""

from dataclasses import dataclass

import numpy as np

from inputs.sampler import KeyedSampler


@dataclass(frozen=True, kw_only=True)
class GroupedSampler(KeyedSampler):
    """A `KeyedSampler` whose updates contain images of one group each, which keeps padding small.

    Each group's images fill updates in the epoch's random order. Updates come in the order in which they are complete;
    the rest of all groups is mixed at the end.

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
