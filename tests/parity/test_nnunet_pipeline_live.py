"""An nnU-Net made by nnunetv2 itself, converted, beside nnunetv2's own predictor: anisotropic scans that are not stored as RAS.

nnunetv2 plans the network from scans (tiny ones, with fewer features), its trainer builds it and writes the checkpoints, its
predictor segments. The predictor adds windows up in half precision; for the comparison it is made to use float32.
"""

import copy
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
_HOME = Path(tempfile.mkdtemp(prefix="xaiseg-nnunet-"))
for _name in ("raw", "preprocessed", "results"):  # read when nnunetv2 is imported
    os.environ[f"nnUNet_{_name}"] = str(_HOME / _name)
pytest.importorskip("nnunetv2", reason="needs nnunetv2, see .ci/run")

from xaiseg._types import Instance  # noqa: E402
from xaiseg.checkpoints import load_model  # noqa: E402
from xaiseg.cli import main  # noqa: E402
from xaiseg.cohort.work import load_scan  # noqa: E402
from xaiseg.imaging import read_input  # noqa: E402
from xaiseg.inference import StitchedPredictor  # noqa: E402
from xaiseg.saliency import jacobian_rows, signed_max  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # warnings of nnunetv2 and what it imports

DATASET = "Dataset001_Blobs"
SPACING = (0.9, 3.5, 1.1)  # of the first three axes in RAS: thick slices from front to back
SHAPE = (44, 14, 40)
CODES = "LSA"


def scan(seed):
    """FLAIR and T1w with blobs inside a box of brain, and the blobs."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    lesions = np.zeros(SHAPE, bool)
    for _ in range(6):
        centre = rng.uniform(0.25, 0.75, 3) * np.multiply(SHAPE, SPACING)
        lesions |= ((grid - centre) ** 2).sum(-1) < rng.uniform(3, 6) ** 2
    brain = np.zeros(SHAPE, bool)
    brain[4:-3, 1:-2, 5:-4] = True
    flair = np.where(brain, 100 + 8 * rng.standard_normal(SHAPE) + 60 * lesions, 0)
    t1w = np.where(brain, 300 + 20 * rng.standard_normal(SHAPE) - 90 * lesions, 0)
    return flair.astype(np.float32), t1w.astype(np.float32), (lesions & brain).astype(np.uint8)


def write(path, array):
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20.0, 7.0, 3.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(tiny.stored(array, CODES, affine), path)
    return path


@pytest.fixture(scope="module")
def trained():
    """The result folder of two folds and the scan to segment."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw = _HOME / "raw" / DATASET
    for i in range(3):
        flair, t1w, mask = scan(i)
        write(raw / "imagesTr" / f"case{i}_0000.nii.gz", flair)
        write(raw / "imagesTr" / f"case{i}_0001.nii.gz", t1w)
        write(raw / "labelsTr" / f"case{i}.nii.gz", mask)
    dataset = {
        "channel_names": {"0": "FLAIR", "1": "T1w"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    preprocess([1], configurations=("3d_fullres",), num_processes=(1,))
    plans = json.loads((_HOME / "preprocessed" / DATASET / "nnUNetPlans.json").read_text())
    plan = plans["configurations"]["3d_fullres"]
    plan["architecture"]["arch_kwargs"]["features_per_stage"] = [
        min(n // 8, 16) for n in plan["architecture"]["arch_kwargs"]["features_per_stage"]
    ]
    plan["patch_size"] = [max(n // 2 // 8 * 8, 8) for n in plan["patch_size"]]  # several windows
    # other than the image's own voxels, so that it is resampled both ways
    plan["spacing"] = [1.3 * s for s in plan["spacing"]]
    for fold in (0, 1):
        trainer = nnUNetTrainer(
            {**plans, "continue_training": False}, "3d_fullres", fold, dataset, device=torch.device("cpu")
        )
        trainer.initialize()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # allows the mirrorings of inference
        torch.manual_seed(fold)
        with torch.no_grad():
            for value in trainer.network.parameters():
                value.add_(0.2 * torch.randn_like(value) * value.abs().mean().clamp(min=0.1))
        folder = Path(trainer.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    (folder.parent / "plans.json").write_text(json.dumps(plans))
    (folder.parent / "dataset.json").write_text(json.dumps(dataset))
    return folder.parent


@pytest.fixture(scope="module")
def manifest():
    flair, t1w, mask = scan(7)
    for name, array in (("FLAIR", flair), ("T1w", t1w), ("reference", mask)):
        write(_HOME / "scans" / f"new_{name}.nii.gz", array)
    line = {"case": "new", **{name: f"new_{name}.nii.gz" for name in ("FLAIR", "T1w", "reference")}}
    return tiny.write_manifest(_HOME / "scans" / "scans.tsv", [line])


@pytest.fixture(scope="module")
def predictor(trained):
    from nnunetv2.inference import predict_from_raw_data as module

    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "half", torch.float32)
    patch.setattr(module, "compute_gaussian", partial(module.compute_gaussian, dtype=torch.float32))
    theirs = module.nnUNetPredictor(
        perform_everything_on_device=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False
    )
    theirs.initialize_from_trained_model_folder(str(trained), use_folds=(0, 1))
    yield theirs
    patch.undo()


@pytest.fixture(scope="module")
def model(trained):
    folder = _HOME / "model"
    assert main(["convert", str(trained), str(folder)]) == 0
    return load_model(folder)


def read(manifest, reader):
    files = [str(manifest.parent / f"new_{name}.nii.gz") for name in ("FLAIR", "T1w")]
    return reader.read_images(files)


def test_logits_of_the_ensemble(predictor, model, manifest):
    """Stitched, mirrored, of two folds, on the preprocessed image."""
    assert model.spec.members == ("fold_0", "fold_1")
    assert len(model.spec.mirror_axes) > 0
    (case,) = read_input(manifest, model.spec.channels)
    ours = load_scan(case, model.spec)
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = read(manifest, reader)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case_npy(
        image, None, properties, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    np.testing.assert_allclose(np.moveaxis(data, 0, -1), ours.image, atol=1e-5 * np.abs(data).max())
    expected = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
    stitched = StitchedPredictor.of(model)
    assert len(stitched.plan(ours.image.shape).starts) > 1
    found = np.asarray(stitched(jnp.asarray(ours.image)))
    assert expected.std() > 0.05
    # the project's demand; measured 1e-6 to 1e-5
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), expected, atol=1e-3)


def test_segmentation_on_the_grid_of_the_input(predictor, model, manifest):
    image, properties = read(manifest, predictor.plans_manager.image_reader_writer_class())
    expected, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
    out = _HOME / "segmented"
    assert main(["segment", str(manifest), str(out), "--model", str(_HOME / "model")]) == 0
    stem = out / "sub-new" / "anat" / "sub-new_space-orig_label-L"
    mask = nib.load(f"{stem}_mask.nii.gz")
    stored = nib.load(manifest.parent / "new_FLAIR.nii.gz")
    assert mask.shape == stored.shape
    np.testing.assert_allclose(mask.affine, stored.affine, atol=1e-4)
    assert "".join(nib.aff2axcodes(mask.affine)) == CODES
    theirs, ours = expected.T > 0, np.asarray(mask.dataobj) > 0
    assert 50 < theirs.sum() < theirs.size / 2
    dice = 2 * (theirs & ours).sum() / (theirs.sum() + ours.sum())
    assert dice >= 0.999
    found = np.asarray(nib.load(f"{stem}_probseg.nii.gz").dataobj)
    np.testing.assert_allclose(found, probabilities[1].T, atol=1e-4)


def test_rows_pass_through_folds_mirrors_and_windows(predictor, model, manifest):
    """Its network, folds, mirrorings and windows added up in PyTorch: its own predictor cannot be differentiated."""
    (case,) = read_input(manifest, model.spec.channels)
    image = load_scan(case, model.spec).image
    ours = StitchedPredictor.of(model)
    plan = ours.plan(image.shape)
    middle = tuple(n // 2 for n in image.shape[:3])
    voxels = np.array([middle, (middle[0], middle[1], middle[2] + 1)], np.int32)
    (found,), (info,) = jacobian_rows(signed_max())(jax.random.key(0), ours, jnp.asarray(image), [Instance(1, voxels)])
    assert info.windows > 1

    assert plan.padding == ((0, 0), (0, 0), (0, 0))
    x = torch.from_numpy(np.moveaxis(image, -1, 0)[None].copy()).requires_grad_()
    weight = torch.from_numpy(plan.weight)
    total = torch.zeros(image.shape[:3])
    norm = torch.zeros(image.shape[:3])
    axes = [a + 2 for a in model.spec.mirror_axes]
    subsets = [[a for i, a in enumerate(axes) if bits >> i & 1] for bits in range(2 ** len(axes))]
    networks = []
    for parameters in predictor.list_of_parameters:
        networks.append(copy.deepcopy(predictor.network).eval())
        networks[-1].load_state_dict(parameters)
    for start in plan.starts:
        where = plan.slices(start)
        window = x[(slice(None), slice(None), *where)]
        mean = sum(torch.flip(f(torch.flip(window, flip)), flip)[0, 1] for f in networks for flip in subsets)
        total[where] = total[where] + weight * mean / (len(subsets) * len(networks))
        norm[where] = norm[where] + weight
    logit = total / norm
    rows = [torch.autograd.grad(logit[tuple(v.tolist())], x, retain_graph=True)[0][0].numpy() for v in voxels]
    rows = np.moveaxis(np.stack(rows), 1, -1)
    expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    whole = np.zeros_like(expected)
    whole[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))] = found.values
    np.testing.assert_allclose(whole, expected, atol=1e-4 * np.abs(expected).max())
