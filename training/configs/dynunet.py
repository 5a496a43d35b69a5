"""The paper's "nnU-Net": MONAI's DynUNet of three levels (341,922 parameters), with the recipe of `unet`.

Made for a cohort of hundreds of scans and a GPU; not trained here. The paper reports nDSC 0.78, TPR 78 %, FDR 38 % on its private
test scans. Its dropout of 0.1 did nothing in the version of MONAI it was trained with; `--set options.dropout=0.1` drops.
"""

from training.config import Config

CONFIG = Config(
    architecture="dynunet",
    options={
        "filters": [16, 32, 64],
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "norm": "instance",
    },
    thresholds=(0.4,),
)
