"""Fine-tuning and transfer: what is loaded, what is new, what is trained."""

import pytest
import torch
from tiny_runs import DIGITS, TINY, TINY_SVT, last, train

import engine
import main_transfer
from models import ModelError, create_model
from runtime.processes import Distributed
from training.classification import Classification, full_model_kwargs
from training.classification_flags import FLAGS
from training.model import freeze_layers, layers_of
from training.optimizer import build_optimizer, build_scheduler
from training.options import parse_args
from training.trainer import set_mode
from utils import UserError


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take as long as the training does here."""
    monkeypatch.setattr(engine.RunDirectory, "_draw", lambda *_: None)


EPOCH = ["--epochs", "1", "--mixup", "0", "--cutmix", "0"]
STILL = [*EPOCH, "--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--weight-decay", "0"]


SMALL = [*DIGITS, "--arch", "spectformer-ti"]  # without the arguments that make TINY of it


def transfer(directory, *flags, model=TINY):
    return train(directory, *flags, model=model, main=main_transfer.main)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained")
    train(directory, *EPOCH)
    return directory / "checkpoint_last.pth"


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def changed(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.slow
def test_the_classifier_stays_where_the_classes_agree(tmp_path, pretrained, capsys):
    train(tmp_path, *STILL, "--finetune", str(pretrained))
    assert not changed(weights(pretrained), last(tmp_path)["model"])
    assert "not from it: nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_other_classes_get_a_new_classifier_and_it_is_said(tmp_path, pretrained, capsys):
    """As many, but others: the numbers alone would not tell."""
    train(tmp_path, *STILL, "--finetune", str(pretrained), "--classes", "2,3")
    assert changed(weights(pretrained), last(tmp_path)["model"]) == {"head.weight", "head.bias"}
    assert "not from it: head.weight, head.bias" in capsys.readouterr().out


@pytest.mark.slow
def test_transfer_always_begins_with_a_new_classifier(tmp_path, pretrained):
    transfer(tmp_path, *STILL, "--finetune", str(pretrained))
    assert "head.weight" in changed(weights(pretrained), last(tmp_path)["model"])


@pytest.mark.slow
def test_evaluation_keeps_the_classifier_of_the_file_and_refuses_other_classes(tmp_path, pretrained, capsys):
    """Also with the recipe of transfer, which trains a new classifier."""
    words = [*TINY, "--output-dir", str(tmp_path), "--eval", "--finetune", str(pretrained)]
    main_transfer.main(words)
    assert "not from it: nothing" in capsys.readouterr().out
    with pytest.raises(UserError, match="the classes of .* differ from those of this data"):
        main_transfer.main([*words, "--classes", "2,3"])


@pytest.mark.slow
def test_transfer_from_a_token_label_model_drops_both_heads(tmp_path):
    args = parse_args(FLAGS, TINY_SVT)
    labelled = create_model(args.arch, 5, args.input_size, args.model_kwargs | {"token_label": True})
    torch.save({"model": labelled.state_dict()}, tmp_path / "labelled.pth")
    transfer(tmp_path / "run", *STILL, "--freeze-bn", "--finetune", str(tmp_path / "labelled.pth"), model=TINY_SVT)
    assert changed(
        last(tmp_path / "run")["model"],
        labelled.state_dict() | {name: torch.empty(0) for name in ("head.weight", "head.bias")},
    ) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model-kwargs", "embed_dim=32", "depth=3", "alpha=1", "num_heads=2"], "Missing key.*blocks.2.norm1"),
        (["--model-kwargs", "embed_dim=48", "depth=2", "alpha=1", "num_heads=2"], "size mismatch"),
        (TINY_SVT[len(DIGITS) :], "Missing key"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, pretrained, flags, expected):
    with pytest.raises(UserError, match=expected) as caught:
        transfer(tmp_path, *EPOCH, "--finetune", str(pretrained), *flags)
    assert str(pretrained) in str(caught.value) and not (tmp_path / "log.txt").exists()


@pytest.mark.slow
def test_another_input_size_is_resized_to(tmp_path, pretrained):
    train(tmp_path, *STILL, "--finetune", str(pretrained), "--input-size", "64")
    resized = last(tmp_path)["model"]
    assert resized["pos_embed"].shape[1] == 16 and weights(pretrained)["pos_embed"].shape[1] == 4
    assert torch.equal(resized["head.weight"], weights(pretrained)["head.weight"])


def test_weights_that_do_not_say_their_model_leave_it_to_the_flags(tmp_path, pretrained):
    bare = tmp_path / "bare.pth"
    torch.save({"model": weights(pretrained)}, bare)
    args = parse_args(FLAGS, [*DIGITS, "--finetune", str(bare)])
    defaults = parse_args(FLAGS, DIGITS)
    assert (args.arch, args.model_kwargs) == (defaults.arch, defaults.model_kwargs)


def modes(flags, model=TINY_SVT):
    args = parse_args(FLAGS, [*model, *flags])
    kwargs = {"drop_path_rate": 0.1} | full_model_kwargs(args)
    net = create_model(args.arch, 2, args.input_size, kwargs)
    freeze_layers(net, args.freeze_at)
    task = Classification.__new__(Classification)  # only its flags matter here
    task.args = args
    set_mode(task, net, args)
    return net


def training(net, kind):
    return {module.training for module in net.modules() if type(module).__name__ == kind}


def test_fine_tuning_keeps_the_model_in_evaluation_mode_unless_asked(pretrained):
    assert training(modes(["--finetune", str(pretrained)]), "BatchNorm2d") == {False}
    assert training(modes(["--finetune", str(pretrained)]), "DropPath") == {False}
    assert training(modes(["--finetune", str(pretrained), "--finetune-mode", "train"]), "BatchNorm2d") == {True}
    assert training(modes([]), "BatchNorm2d") == {True}


def test_token_labels_can_be_fine_tuned_on_in_evaluation_mode(pretrained):
    """Only the root is in training mode: it returns what the token-label loss needs."""
    net = modes(["--finetune", str(pretrained), "--token-label", "--token-label-data", "maps"])
    assert training(net, "BatchNorm2d") == training(net, "DropPath") == {False}
    outputs = net(torch.zeros(2, 3, 32, 32), box=(0, 0, 1, 1))
    assert [tuple(logits.shape) for logits in outputs[:2]] == [(2, 2), (2, 1, 2)]


def test_frozen_batch_norms_use_their_stored_statistics():
    assert training(modes(["--freeze-bn"]), "BatchNorm2d") == {False}
    assert training(modes(["--freeze-bn"]), "DropPath") == {True}


@pytest.mark.slow
def test_frozen_layers_stay_and_the_others_learn(tmp_path, pretrained):
    transfer(tmp_path, *EPOCH, "--finetune", str(pretrained), "--freeze-at", "2")
    moved = changed(weights(pretrained), last(tmp_path)["model"])
    assert not any(name.startswith(("pos_embed", "patch_embed", "blocks.0.")) for name in moved)
    assert any(name.startswith("blocks.1.") for name in moved)


def test_a_frozen_stem_keeps_its_batch_statistics():
    net = modes(["--freeze-at", "1"])
    assert not any(weight.requires_grad for weight in net.stem.parameters())
    assert training(net.stem, "BatchNorm2d") == {False}


def test_more_layers_than_there_are_cannot_be_frozen():
    with pytest.raises(UserError, match="--freeze-at 99: the model has"):
        modes(["--freeze-at", "99"])
    with pytest.raises(UserError, match="--freeze-at: this model defines no layers"):
        freeze_layers(create_model("caformer_s18", 2, None, {}), 1)


@pytest.mark.parametrize("model", [TINY, TINY_SVT])
def test_the_rate_falls_by_a_factor_a_layer_from_the_head_to_the_stem(model):
    args = parse_args(FLAGS, [*model, "--layer-decay", "0.5", "--unscale-lr", "--lr", "1"])
    net = create_model(args.arch, 2, args.input_size, args.model_kwargs)
    optimizer = build_optimizer(args, net, Distributed())
    build_scheduler(args, optimizer, updates_per_epoch=4).step(0)
    names = {weight: name for name, weight in net.named_parameters()}
    rates = {names[weight]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    layers = layers_of(net)
    assert len(rates) == len(names)
    for number, (_, members) in enumerate(sorted(layers.items())):
        expected = max(rates.values()) * 0.5 ** (len(layers) - 1 - number)
        assert [rates[name] for name in members] == pytest.approx([expected] * len(members))


@pytest.mark.slow
def test_the_checkpoint_says_which_model_is_fine_tuned(tmp_path, pretrained):
    """Name and arguments; what the command line says of them goes before."""
    transfer(tmp_path / "all", *STILL, "--finetune", str(pretrained), model=DIGITS)
    state = last(tmp_path / "all")
    assert (state["arch"], state["model_kwargs"]["embed_dim"]) == ("spectformer_ti", 32)
    assert changed(weights(pretrained), state["model"]) == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match="Missing key.*blocks.2"):
        transfer(tmp_path / "deep", *STILL, "--finetune", str(pretrained), "--model-kwargs", "depth=3", model=SMALL)
    with pytest.raises(UserError, match="the weights do not fit the model"):
        transfer(tmp_path / "other", *STILL, "--finetune", str(pretrained), "--arch", "spectformer-xs", model=DIGITS)


@pytest.mark.parametrize("arch", ["spectformer_ti", "resnet18"])
def test_token_labels_need_a_model_that_labels_tokens(arch):
    with pytest.raises(ModelError, match="token_label"):
        create_model(arch, 2, (32, 32), {"token_label": True})
