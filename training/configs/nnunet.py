"""nnU-Net v2 (Isensee et al., Nature Methods 2021): network, patch, batch and preprocessing by its rules from the training cases,
with its recipe: SGD, deep supervision, Dice and cross-entropy, its augmentation.

`--plans plans.json` takes a plan that nnU-Net made. Made for a GPU; not trained here. The steps are its 1000 epochs of 250. Beyond
a crop's border the border is repeated where nnU-Net reads zeros or, near the crop, the image: `margin` gives the latter.
"""

from training.augment import NNUNET
from training.config import Config

CONFIG = Config(
    planner="ExperimentPlanner",
    architecture="plain_conv_unet",  # this, options, window, patch and batch are the plan's; here those of small images
    options={
        "features": [32, 64, 128],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "convs": [2, 2, 2],
        "decoder_convs": [2, 2],
    },
    orientation="native",
    overlap=0.5,
    batch=2,
    positive_fraction=0.33,
    forced=True,
    augmentation=NNUNET,
    loss={"dice": 1.0, "cross_entropy": 1.0},
    steps=250_000,
    optimiser="sgd",
    learning_rate=1e-2,
    momentum=0.99,
    schedule="polynomial",
    weight_decay=3e-5,
    clip=12.0,
    validate_every=12_500,
    checkpoint_every=2500,
    thresholds=(0.5,),
)
