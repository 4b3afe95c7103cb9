"""The runs that docs/performance.md reports, each a command line for a process of its own."""

from .models import PARTS

DEIT = "deit_small_patch16_224"
PEERS = f"pvt_v2_b2 {DEIT} swin_tiny_patch4_window7_224"
VARIANTS = " ".join(
    [f"spectformer_{size}" for size in ("ti", "xs", "s", "b")]
    + [f"{family}_{size}" for family in ("spectformer_h", "svt_h") for size in ("s", "b", "l")]
)
CPU = "--rounds 7 --parts inference training memory"
FAST_CUDA = "--device cuda --dtype bfloat16 --channels-last --batch-size 256 --rounds 20"
SUITES = {
    "cpu": (
        f"svt_h_s@bfloat16 svt_h_s plain:svt_h_s pvt_v2_b2@bfloat16 pvt_v2_b2 {CPU}",
        f"spectformer_h_s@bfloat16 spectformer_h_s plain:spectformer_h_s pvt_v2_b2@bfloat16 pvt_v2_b2 {CPU}",
        f"spectformer_xs@bfloat16 spectformer_xs {DEIT}@bfloat16 {DEIT} {CPU}",
        "onnx:spectformer_xs spectformer_xs onnx:spectformer_h_s spectformer_h_s onnx:svt_h_s svt_h_s --batch-size 4"
        " --rounds 7 --parts inference",
    ),
    "cpu-compiled": (
        "svt_h_s@compile svt_h_s pvt_v2_b2@compile pvt_v2_b2 --rounds 5 --parts inference training",
        "spectformer_h_s@compile spectformer_h_s pvt_v2_b2@compile --rounds 5 --parts inference training",
    ),
    "cpu-layers": ("--layers --rounds 9", "--precisions --dtype bfloat16 --rounds 9"),
    "cuda": (
        f"svt_h_s spectformer_h_s spectformer_xs {PEERS} plain:svt_h_s@float16,eager,contiguous"
        f" {FAST_CUDA} --compile --parts {' '.join(PARTS)}",
        f"svt_h_s spectformer_h_s spectformer_xs {PEERS} {FAST_CUDA}",
    ),
    "cuda-variants": (f"{VARIANTS} {FAST_CUDA} --compile --parts training graph-breaks",),
    "cuda-layers": (
        f"--layers {FAST_CUDA}",
        f"--precisions --grids 14 28 56 {FAST_CUDA}",
        f"--precisions --grids 14 28 56 {FAST_CUDA} --compile",
    ),
}
