"""The paper's Swin UNETR (feature size 24, 15.7 M parameters), with the recipe of `unet`.

Made for a cohort of hundreds of scans and a GPU; not trained here. The paper reports nDSC 0.80, TPR 85 %, FDR 36 % on its private
test scans.
"""

from training.config import Config

CONFIG = Config(
    architecture="swin_unetr",
    options={"feature_size": 24, "patch_merging": "merging"},
    thresholds=(0.4,),
)
