"""The command line: layers of defaults, both spellings, and one line for every mistake."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import detection.flags
import main_detection
import main_spectformer
import main_svt
import main_transfer
from models import ModelError, create_model
from models.checkpoints import CheckpointError
from runtime import checkpoints
from training import options
from training.classification_flags import FLAGS
from training.options import build_parser, parse_args
from utils import UserError

ROOT = Path(__file__).parent.parent
MAINS = (main_spectformer, main_svt, main_transfer)


def parse(*words, main=main_spectformer):
    return parse_args(flags_of(main), words, main.RECIPES)


def flags_of(main):
    return detection.flags.FLAGS if main is main_detection else FLAGS


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_defaults_are_the_vanilla_recipe():
    args = vars(parse("--data-path", "imagenet"))
    recipe = {
        "opt": "adamw",
        "opt_eps": 1e-8,
        "weight_decay": 0.05,
        "lr": 5e-4,
        "sched": "cosine",
        "warmup_epochs": 5,
        "warmup_lr": None,  # 1e-6 and 1e-5 where the peak is ten times as high
        "min_lr": None,
        "epochs": 300,
        "clip_grad": 1.0,
        "aa": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "train_interpolation": "bicubic",
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch_prob": 0.5,
        "smoothing": 0.1,
        "reprob": 0.0,
        "repeated_aug": False,
        "model_ema": False,
        "model_ema_decay": 0.99996,
        "distillation_type": "none",
        "distillation_alpha": 0.5,
        "distillation_tau": 1.0,
        "eval_crop_pct": 0.875,
        "checkpoint_epochs": 100,
        "checkpoint_steps": 0,
        "keep_best": 1,
        "print_freq": 50,
        "seed": 0,
        "batch_size": 128,
        "accum_iter": 1,
        "momentum": 0.9,
        "warmup_updates": 0,
        "cooldown_epochs": 0,
        "decay_epochs": None,
        "decay_rate": 0.1,
        "drop": 0.0,
        "freeze_at": 0,
        "recount": 1,
        "mixup_prob": 1.0,
        "dense_weight": 0.5,
        "cls_weight": 1.0,
    }
    assert {name: args[name] for name in recipe} == recipe


def command(line, main=main_spectformer):
    return parse(*shlex.split(line), main=main)


def test_no_aug_also_turns_mixing_and_erasing_off():
    args = command("--no-aug --reprob 0.25", main_svt)
    assert (args.no_aug, args.mixup, args.cutmix, args.repeated_aug, args.reprob) == (True, 0, 0, False, 0.25)


def test_published_commands_parse_verbatim():
    args = command("--output_dir logs/xs --arch spectformer-xs --batch-size 128 --data-path /path/to/ILSVRC2012/")
    assert (args.data_set, args.output_dir, args.batch_size) == ("IMNET", "logs/xs", 128)
    line = "--config configs/svt/svt_s.yaml --data-path /imagenet --epochs 310 --batch-size 128 --token-label "
    args = command(line + "--token-label-size 7 --token-label-data /maps", main_svt)
    assert (args.mixup, args.cutmix, args.repeated_aug, args.train_interpolation) == (0, 0, False, "random")
    assert (args.reprob, args.eval_crop_pct, args.keep_best, args.clip_grad) == (0.25, 0.96, 10, 0)
    line = "--arch spectformer-xs --batch-size 64 --data-set CARS --data-path /cars --epochs 1000 --lr 0.0001 "
    args = command(line + "--weight-decay 1e-4 --clip-grad 1 --warmup-epochs 5", main_transfer)
    assert (args.data_set, args.classifier, args.lr) == ("CARS", "new", 1e-4)
    args = command("--input-size 384 --batch-size 64 --lr 5e-6 --weight-decay 1e-8 --min-lr 5e-6 --epochs 30")
    assert (args.input_size, args.finetune_mode) == ((384, 384), "eval")


def test_underscores_and_hyphens_are_the_same_flag():
    assert parse("--batch_size", "8", "--no_pin_mem", "--data_set=CIFAR10") == parse(
        "--batch-size", "8", "--no-pin-mem", "--data-set=CIFAR10"
    )


def test_the_strongest_layer_wins(tmp_path):
    """Parser < file < command line; what a flag implies is as strong as the place where it stands."""
    assert parse(main=main_svt).repeated_aug
    labels = ("--token-label", "--token-label-data", "maps")
    assert not parse(*labels, main=main_svt).repeated_aug
    path = config(tmp_path, "repeated-aug: true\nlr: 5e-3\nepochs: 7\n")
    args = parse(*labels, path, "--epochs", "9", main=main_svt)
    assert (args.repeated_aug, args.lr, args.epochs, args.reprob) == (False, 5e-3, 9, 0)
    assert parse(path, "--repeated-aug", *labels, main=main_svt).repeated_aug
    path = config(tmp_path, "repeated-aug: true\ntoken-label: true\ntoken-label-data: maps\n")
    assert parse(path).repeated_aug and parse(path).mixup == 0


def test_model_kwargs_of_the_command_line_change_single_ones_of_the_config(tmp_path):
    path = config(tmp_path, "model_kwargs: {depth: 4, embed_dim: 64}\n")
    assert parse(path, "--model-kwargs", "depth=2", "mixers=('fnet','pool')").model_kwargs == {
        "depth": 2,
        "embed_dim": 64,
        "mixers": ("fnet", "pool"),
    }


def test_without_data_path_the_digits_are_trained():
    args = parse()
    assert (args.data_set, args.output_dir) == ("DIGITS", "runs/spectformer_xs-digits")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epoch", "3"], r"--epoch; did you mean --epochs\?"),
        (["--batch-sise=3"], r"--batch-sise=3; did you mean --batch-size\?"),
        (["stray"], "stray"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "7"], "even"),
        (["--batch-size", "eight"], "'eight' is not an integer"),
        (["--lr", "nan"], "'nan' is not a number"),
        (["--lr=-1"], "--lr"),
        (["--weight-decay"], "--weight-decay"),
        (["--drop-path", "1.5"], "at most 1"),
        (["--input-size", "0"], r"--input-size: '0' is not an integer of at least 1 and at most 9999"),
        (["--input-size", "1x2x3"], "--input-size: '2x3' is not an integer"),
        (["--amp", "fp8"], "fp8"),
        (["--model-kwargs", "depth"], "key=value"),
        (["--model-kwargs", "checkpoint_path='/etc/passwd'"], "--model-kwargs: .*checkpoint_path.* make timm read"),
        (
            ["--model-kwargs", "pretrained=True", "--arch", "resnet18"],
            "pretrained would make timm read",
        ),
        (["--model-kwargs", "in_chans=1"], "use --in-chans"),
        (["--token-label"], "--token-label-data"),
        (["--token-label", "--token-label-data", "m", "--mixup", "0.2"], "MixToken"),
        (["--eval"], "either --resume PATH or --finetune PATH"),
        (["--distillation-type", "hard"], "--teacher-model"),
        (["--dtype", "float64", "--amp", "bf16"], "float64"),
        (["--sync-bn", "--freeze-bn"], "--freeze-bn"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--aa", "rand-q1"], "not a policy"),
        (["--aa", "fancy"], "not a policy"),
        (["--epochs", "0"], "an integer of at least 1 and at most 1000000"),
        (["--seed", str(2**63)], "an integer of at least 0 and at most 9223372036854775807"),
        (["--arch", ""], "--arch: it is empty"),
        (["--data-path="], "--data-path: it is empty"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_one_line_error(words, expected):
    with pytest.raises((UserError, CheckpointError), match=expected) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning-rate: 1", "unknown key 'learning-rate'"),
        ("epoch: 1", r"did you mean epochs\?"),
        ("epochs: many", "epochs: 'many' is not an integer"),
        ("epochs: true", "epochs"),
        ("epochs: null", "epochs"),
        ("epochs: [1]", "epochs"),
        ("lr: .nan", "lr"),
        ("eval: 1", "eval"),
        ("arch: ''", "--arch: it is empty"),
        ("sched: linear", "sched"),
        ("model-kwargs: 3", "key=value"),
        ("cutmix-minmax: [0.1]", "expected 2"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- epochs", "flag: value"),
        ("", "flag: value"),
        ("epochs: [", "not YAML"),
        ("!!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_mistake_in_a_config_names_file_and_key(tmp_path, text, expected):
    path = config(tmp_path, text)
    with pytest.raises(UserError, match=expected) as caught:
        parse(path)
    assert "config.yaml" in str(caught.value) and "\n" not in str(caught.value)


CONFIGS = sorted(set(ROOT.glob("configs/**/*.yaml")) - set(ROOT.glob("configs/studies/*")))  # those are tables of runs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_paper_accuracy_and_command_and_holds_only_deltas(path):
    text = path.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(rf"main_\w+\.py --config {path.relative_to(ROOT)}", head)
    assert "https://arxiv.org/abs/" in head
    assert re.search(r"top-1|accuracy|AP", head)
    flags = detection.flags.FLAGS if path.parent.name == "detection" else FLAGS
    plain, configured = vars(parse_args(flags, [])), vars(parse_args(flags, ["--config", str(path)]))
    keys = {key.replace("-", "_") for key in yaml.safe_load(text)}
    assert {key for key in keys if configured[key] == plain[key]} <= {"arch", "detector", "data_set"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name != "detection"], ids=lambda path: path.stem
)
def test_a_config_says_all_whichever_main_runs_it(path):
    assert len({repr(parse("--config", str(path), main=main)) for main in MAINS}) == 1


def test_the_evaluation_crop_is_the_models_own_whichever_main_runs_it():
    for main in MAINS:
        data = ("--data-path", "photos")
        assert parse("--arch", "svt_h_s", *data, main=main).eval_crop_pct == 0.96
        assert parse("--arch", "spectformer_xs", *data, main=main).eval_crop_pct == 0.875
        assert parse("--arch", "svt_h_s", "--eval-crop-pct", "0.9", main=main).eval_crop_pct == 0.9
        assert parse("--arch", "svt_h_s", *data, "--input-size", "32", main=main).eval_crop_pct == 1
        assert parse("--input-size", "32", "--crop-pct", "0.9", main=main).eval_crop_pct == 0.9


@pytest.mark.parametrize("main", [*MAINS, main_detection])
def test_help_fits_eighty_columns(main):
    first, *lines = build_parser(flags_of(main), main.RECIPES, main.__doc__).format_help().splitlines()
    assert first.endswith(" [flags]") and max(map(len, lines)) <= 80


@pytest.mark.slow
def test_every_setting_that_is_read_is_a_flag():
    trees = [
        ast.parse(path.read_text())
        for path in [ROOT / "engine.py", ROOT / "datasets.py", *(ROOT / "training").glob("*.py")]
    ]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if ast.unparse(node.value) in ("args", "self.args", "trainer.args")}
    assert len(read) > 70 and read - set(dir(dict)) <= build_parser(FLAGS).settings().keys() | {"config"}


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, 1, 2), (64, 1, 16), (64, 8, 8), (2, 8, 1)])
def test_each_process_gets_its_share_of_the_cores_for_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(options, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse().num_workers == workers


def test_the_model_is_that_of_the_weights_to_begin_with_unless_another_is_named(tmp_path):
    gone = str(tmp_path / "gone.pth")
    args = parse("--finetune", gone, "--resume", "auto")  # a run that resumes can do without the file
    assert (args.finetune, args.arch) == (gone, "spectformer_xs")
    with pytest.raises(CheckpointError, match=gone):
        parse("--finetune", gone)
    recorded = {"arch": "spectformer_ti", "model_kwargs": {"depth": 2, "alpha": 1, "token_label": True}}
    checkpoints.save(gone, recorded | {"model": {}})
    args = parse("--finetune", gone, "--model-kwargs", "depth=3")
    assert (args.arch, args.model_kwargs) == ("spectformer_ti", {"depth": 3, "alpha": 1})
    assert args.output_dir == "runs/spectformer_ti-digits" and args.eval_crop_pct == 1  # digits are not cropped
    assert parse("--finetune", gone, "--arch", "svt_h_s").model_kwargs == {}
    checkpoints.save(gone, recorded | {"model_kwargs": {"pretrained": True}})
    with pytest.raises(CheckpointError, match="pretrained would make timm read other files"):
        parse("--finetune", gone)


def test_a_runs_own_record_is_read_without_its_places(tmp_path):
    record = "command: python main.py\nargs: {epochs: 7, output_dir: old, resume: old.pth, eval: true, arch: null}\n"
    args = parse(config(tmp_path, record))
    assert (args.epochs, args.resume, args.eval, args.arch) == (7, None, False, "spectformer_xs")
    assert args.output_dir != "old"
    with pytest.raises(UserError, match="unknown key 'args'"):
        parse(config(tmp_path, "args: {epochs: 7}\n"))


@pytest.mark.parametrize(
    "words",
    [(), ("--aa", "none", "--opt-betas", "0.9", "0.95", "--model-kwargs", "global_pool=avg", "num_heads=(1, 2)")],
)
@pytest.mark.parametrize("main", MAINS)
def test_a_printed_config_is_a_complete_one(main, words, tmp_path, capsys):
    words = (*words, "--val-split", "0.2:7", "--train-part", "0.5", "--input-size", "32x48", "--seed", "3")
    assert set(printed_config(main, words, tmp_path, capsys)) >= {"lr", "arch", "output_dir", "val_split"}


def test_a_printed_config_of_a_detector_is_a_complete_one(tmp_path, capsys):
    words = ("--data-path", "coco", "--min-size", "480,640", "--detector-kwargs", "anchor_sizes=(8,16)", "detections=9")
    assert printed_config(main_detection, words, tmp_path, capsys)["data_set"] == "COCO"


def printed_config(main, words, tmp_path, capsys):
    """What --print-config says, once a command line of it alone has come to the same settings as the words."""
    with pytest.raises(SystemExit) as left:
        parse(*words, "--print-config", main=main)
    assert left.value.code == 0
    printed = capsys.readouterr().out
    again, asked = (
        json.dumps(vars(parse(*line, main=main)) | {"config": None}) for line in ([config(tmp_path, printed)], words)
    )
    assert again == asked  # a config's lists are a command line's tuples
    return yaml.safe_load(printed)


@pytest.mark.parametrize("value", ["0", "1.5", "x", "0.5:-1"])
def test_a_part_to_train_on_is_not_empty_and_at_most_the_whole(value):
    assert parse("--train-part", "1").train_part == (1.0, 0)
    with pytest.raises(UserError, match="--train-part"):
        parse(f"--train-part={value}")


@pytest.mark.parametrize("value", ["0", "1", "1.5", "x", "0.5:-1", "0.5:x", ":3"])
def test_a_share_to_validate_on_leaves_something_to_train_on(value):
    with pytest.raises(UserError, match="--val-split"):
        parse(f"--val-split={value}")


def chosen(*words, main=main_spectformer):
    return parse(*words, main=main).model_kwargs


def test_a_flag_that_chooses_mixers_replaces_every_weaker_choice(tmp_path):
    text = "spectral*2/fnet*2/attention*2/attention"
    recipe = config(
        tmp_path, "arch: spectformer_h_s\nmodel-kwargs: {depths: [2, 2, 2, 1], spectral_depths: [2, 0, 0, 0]}\n"
    )
    assert chosen(recipe, "--mixers", text) == {"depths": [2, 2, 2, 1], "mixers": text}
    assert chosen(recipe, "--model-kwargs", f"mixers={text}") == {"depths": [2, 2, 2, 1], "mixers": text}
    other = config(tmp_path, f"arch: spectformer_h_s\nmixers: {text}\n")
    assert chosen(other) == {"mixers": text}
    assert chosen(other, "--model-kwargs", "spectral_depths=(1,0,0,0)") == {"spectral_depths": (1, 0, 0, 0)}
    assert chosen(other, "--model-kwargs", "spectral_stages=1") == {"spectral_stages": 1}
    assert chosen("--mixers", "spectral*4,attention*8", "--model-kwargs", "embed_dim=64") == {
        "embed_dim": 64,
        "mixers": "spectral*4,attention*8",
    }
    with pytest.raises(UserError, match="--mixers and --model-kwargs mixers=... exclude each other"):
        parse("--mixers", "none*12", "--model-kwargs", "mixers=pool*12")


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [
        ("spectral*4,atention*8", "no mixer is called 'atention'; choose from attention, spectral"),
        ("spectral*4,attention*7", "name 11 blocks, but there are 12"),
        ("spectral*x,attention*8", "is neither NAME nor NAME\\*COUNT"),
        ("spectral*4/attention*8", "is neither NAME nor NAME\\*COUNT"),
    ],
)
def test_wrong_mixers_are_a_one_line_error(mixers, expected):
    args = parse("--mixers", mixers)
    with pytest.raises(ModelError, match=expected) as caught:
        create_model(args.arch, 10, (32, 32), args.model_kwargs)
    assert "\n" not in str(caught.value)
