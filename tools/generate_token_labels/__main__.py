r"""Write the label maps that token labelling trains on: a teacher's top-5 classes at each place of each image.

    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --model-path TEACHER.pth
    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --input-size 576 \
        --pretrained --arch dm_nfnet_f6.dm_in1k
    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --check

The teacher is any classifier that timm has, or one trained here, of the data set's own classes. It sees each
whole image, squashed to a square, and its classifier is applied to every place of its last feature map. The
logits are interpolated to 18 x 18.

A map is `<output-dir>/<class folder>/<image stem>.pt`, a tensor (2, 5, 18, 18): logits, largest first, then
class indices. So are the published maps (label_top5_train_nfnet, from NFNet-F6 at 576 pixels, whose feature
map is 18 x 18), which are half floats, e.g. `label_top5_train_nfnet/n01440764/n01440764_18.pt`. With more
than 2,048 classes, whose indices half floats do not hold, the same tensor is float32.

A second call goes on where the first one stopped: maps that are whole stay. Under torchrun every process
takes its share of the images. `--check` names every map that is missing, damaged, for other classes, or of
no image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from inputs.catalogue import build_dataset
from inputs.images import ImageDataset
from inputs.label_maps import image_map_path
from runtime.entry_point import run_cli
from runtime.processes import init_distributed
from tools.command_line import ToolParser
from tools.machine import cores
from training.arguments import POSITIVE, WORKERS, class_list, image_size
from utils import UserError

from .checking import check
from .writing import generate


def map_paths(dataset: ImageDataset, folder: Path) -> list[Path]:
    """Each image's map; raises UserError where two images would share one."""
    images: dict[Path, int] = {}
    for index in range(len(dataset)):
        path = image_map_path(folder, dataset.path(index))
        if path in images:
            raise UserError(
                f"{dataset.path(images[path])} and {dataset.path(index)} would share the label "
                f"map {path}; rename one of them"
            )
        images[path] = index
    return list(images)


def build_parser() -> ToolParser:
    parser = ToolParser("generate_token_labels", __doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR", help="where the data set lies, as in training")
    add("--data-set", default="FOLDER", metavar="NAME", help="as in training (default: %(default)s)")
    add("--classes", type=class_list, metavar="A,B,...", help="only these classes, as in training")
    add("--inat-category", default="name", metavar="RANK", help="what INAT19 classifies, as in training")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="of the label maps, --token-label-data later")
    add("--check", action="store_true", help="write nothing; name missing, damaged, mismatched, stray maps")
    add = parser.add_argument_group("teacher").add_argument
    add("--model-path", type=Path, metavar="CKPT", help="a checkpoint of ours, of the authors' or of timm")
    add("--arch", metavar="NAME", help="timm's name, where the checkpoint does not say it")
    add("--pretrained", action="store_true", help="take the weights that timm publishes")
    add("--input-size", type=image_size, metavar="PIXELS", help="(default: the teacher's own)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=POSITIVE, default=64, metavar="N", help="images a step (default: %(default)s)")
    add(
        "--num-workers",
        type=WORKERS,
        default=min(10, cores()),
        metavar="N",
        help="processes that read; 0: read in this one (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="none", choices=["auto", "bf16", "fp16", "none"], help="(default: %(default)s)")
    parser.set_defaults(dtype="float32")
    return parser


def validate(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    if args.check:
        return
    if bool(args.model_path) == args.pretrained:
        raise UserError("the teacher is either --model-path CKPT or --arch NAME --pretrained")
    if args.pretrained and args.arch is None:
        raise UserError("--pretrained needs --arch NAME")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    validate(args)
    dist = init_distributed(args.device)
    dataset = build_dataset(
        args.data_set, args.data_path, "train", inat_category=args.inat_category, classes=args.classes
    )
    paths = map_paths(dataset, args.output_dir)
    if args.check:
        check(args, paths, len(dataset.class_names))
    else:
        generate(args, dataset, paths, dist)


if __name__ == "__main__":
    run_cli(main)
