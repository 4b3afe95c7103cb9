"""timm's own tests/test_models.py over all our names; what concerns tracing stands in test_tracing.py."""

import pytest
import timm
import torch
from small_models import create, images

from models import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_cfgs(name):
    model = create(name).eval()
    weights, cfg = model.state_dict(), model.default_cfg
    assert model.num_classes >= 0 and model.num_features > 0 and model.head_hidden_size > 0

    features = model.forward_features(images())
    assert (cfg["pool_size"] is None) == (features.ndim == 3), "a sequence has no pool size"
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images()).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images()).shape == features.shape
    assert create(name, num_classes=0).eval()(images()).shape == (2, model.num_features)
    assert create(name, num_classes=0, global_pool="").eval()(images()).shape == features.shape

    names = (cfg["classifier"], cfg["first_conv"])
    assert all(f"{name}.weight" in weights for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("arguments", [{"features_only": True}, {"features_only": True, "feature_cls": "fx"}], ids=str)
def test_forward_features(name, arguments):
    model = create(name, **arguments).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    features = model(images())
    for feature, width, reduction in zip(features, channels, reductions, strict=True):
        shape = feature.shape if feature.shape[1] == width else feature.permute(0, 3, 1, 2).shape
        assert shape == (2, width, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_intermediates(name):
    model = create(name).eval()
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    features, intermediates = model.forward_intermediates(images())
    assert [x.shape[1] for x in intermediates] == info.channels()
    assert [64 // x.shape[2] for x in intermediates] == info.reduction()
    assert torch.allclose(features, model.forward_features(images()))
    model.set_grad_checkpointing()
    checkpointed, _ = model.forward_intermediates(images())
    assert torch.allclose(checkpointed, features, rtol=1e-4, atol=1e-5)
