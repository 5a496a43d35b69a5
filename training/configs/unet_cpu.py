"""A small U-Net on 64³ patches for real 1 mm scans, for a machine without GPU.

Half a second a step on two idle cores, 35 minutes for all. Measured before patches were read by Grain, with `--steps 1000` on four
scans of three patients (open_ms sub-19, mslesseg sub-14 and sub-18), killed at step 320 and resumed: loss 0.61 to 0.30, and on
open_ms sub-26 nDSC 0.63, Dice 0.64, 53 % of the lesions found, 83 % of the predicted ones false, half of those three voxels or
fewer (threshold 0.4, chosen on it).
"""

from training.augment import Augmentation
from training.config import Config

CONFIG = Config(
    options={"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "norm": "batch"},
    window=(96, 96, 96),
    patch=(64, 64, 64),
    augmentation=Augmentation(flips=(0.5, 0.5, 0.5), quarter_turns=(0.5, 0.5, 0.5), shift=0.5, scale=0.5),
    steps=4000,
    optimiser="adamw",
    learning_rate=1e-3,
    schedule="polynomial",
    weight_decay=1e-2,
    validate_every=500,
    checkpoint_every=250,
    thresholds=(0.3, 0.4, 0.5, 0.6, 0.7),
)
