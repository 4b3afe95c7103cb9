"""Object detection and instance segmentation: torchvision's detectors over our pyramids, or any of timm's."""
