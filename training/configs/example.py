"""The built-in example of `xaiseg demo`: a tiny U-Net on synthetic brains (`xaiseg.imaging.phantom`, 1.5 mm).

Training brains are drawn with seeds 1000 to 1023, validation brains with 2000 to 2003; the demo's have seeds below 100.
The shipped network was made before patches were read by Grain and augmented on the device; the recipe is the same, its random
numbers are not. Measured of it: on the validation brains nDSC 0.81, Dice 0.71, 88 % of 51 lesions found, 21 % of those predicted
false (step 1600, threshold 0.3, chosen on these brains). On eight used for nothing else (seeds 4000 to 4007, `xaiseg segment`):
nDSC 0.73, Dice 0.67, 64 true and 39 false predicted lesions, 12 missed. V is the whole array, connectivity 18, rule `overlap`.
"""

from training.augment import Augmentation
from training.config import Config

CONFIG = Config(
    options={"channels": [8, 16, 32, 64], "strides": [2, 2, 2], "norm": "batch"},
    window=(64, 64, 64),
    min_voxels=4,
    default_layer="decoder2.conv",  # at decoder1.conv the paper's form is zero everywhere for half of the lesions
    phantoms=(1000, 1024),
    validation_phantoms=(2000, 2004),
    patch=(48, 48, 48),
    batch=8,
    augmentation=Augmentation(flips=(0.5, 0.5, 0.5), quarter_turns=(0.5, 0.5, 0.5), shift=0.5, scale=0.5),
    steps=2000,
    optimiser="adamw",
    learning_rate=2e-3,
    schedule="cosine",
    weight_decay=1e-2,
    validate_every=200,
    checkpoint_every=200,
    thresholds=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)
