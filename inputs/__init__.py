"""The room behind `datasets`: data sets, transforms, the order of samples, loaders, label maps."""
