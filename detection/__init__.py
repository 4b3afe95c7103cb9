"""Object detection and instance segmentation: torchvision's detectors on this project's or timm's models."""
