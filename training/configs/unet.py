"""The network and recipe of the paper (7.9 M parameters, 96³ patches, Adam at 1e-5, nDice + focal loss).

Made for a cohort of hundreds of scans and a GPU; not trained here. The paper reports nDSC 0.71, TPR 79 %, FDR 37 % on its
private test scans. Its 200 epochs of 32 patches for each of 585 patients are 936,000 steps of batch 4, with early stopping;
here the best of 100,000 steps on the validation cases is kept.
"""

from training.config import Config

CONFIG = Config()
