"""The real checkpoint on a real scan gives the Dice that PyTorch gave, whichever way the scan is named."""

from pathlib import Path

import pytest

from xaiseg.checkpoints import convert
from xaiseg.cohort import Request, segment

pytestmark = pytest.mark.data


@pytest.mark.slow
@pytest.mark.parametrize("named_by", ["bids", pytest.param("manifest", marks=pytest.mark.slow)])
def test_dice_of_a_real_scan(shared: Path, tmp_path: Path, named_by: str) -> None:
    source = shared / "data" / "open_ms"
    if named_by == "manifest":
        anat = source / "sub-26" / "anat"
        mask = source / "derivatives" / "consensus" / "sub-26" / "anat" / "sub-26_space-MNI_label-L_mask.nii.gz"
        cells = ["sub-26", *(str(anat / f"sub-26_space-MNI_{c}.nii.gz") for c in ("FLAIR", "T1w")), str(mask)]
        source = tmp_path / "scans.tsv"
        source.write_text("case\tFLAIR\tT1w\treference\n" + "\t".join(cells) + "\n")
    model = convert(shared / "models" / "monai_unet_ms.pth", window=(96, 96, 96))
    (row,) = segment(model, Request(source, tmp_path / "out", cases=("sub-26",)))
    # shared/models/README.md: Dice 0.83, nDSC 0.82, 21 lesions of which 12 are true, to the digits given there
    assert row["dice"] == pytest.approx(0.83, abs=0.005)
    assert row["ndsc"] == pytest.approx(0.82, abs=0.005)
    assert (row["lesions"], row["TP"]) == (21, 12)
