"""Data sets, transforms, the order of samples, loaders and label maps. `inputs.data` builds a run's loaders."""
