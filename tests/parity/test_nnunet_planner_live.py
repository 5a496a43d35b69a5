"""Plans, fingerprint and recipe beside nnunetv2's own planners, extractor and trainer, which run in a process of their own.

    python tests/parity/test_nnunet_planner_live.py

makes tests/fixtures/nnunet_plans.json anew, what the ordinary tests compare with (made with nnunetv2 2.8.1).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from inspect import getsource
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "nnunet_plans.json"
DATASET = "Dataset001_Lesions"
STATISTICS = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")

pytestmark = pytest.mark.parity


def task(
    spacings, shape, cases, relative=0.6, channels=("FLAIR", "T1w"), planner="ExperimentPlanner", classes=2, seed=0
):
    """What a planner is given: shapes within 8 % of `shape`, spacings drawn from `spacings`, axes (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    return {
        "planner": planner,
        "channel_names": list(channels),
        "classes": classes,
        "fingerprint": {
            "spacings": [list(spacings[i]) for i in rng.integers(len(spacings), size=cases)],
            "shapes_after_crop": np.round(shape * rng.uniform(0.92, 1.08, (cases, 3))).astype(int).tolist(),
            "foreground_intensity_properties_per_channel": {
                str(c): dict(zip(STATISTICS, rng.uniform(1, 900, 7).tolist(), strict=True))
                for c in range(len(channels))
            },
            "median_relative_size_after_cropping": relative,
        },
    }


ISOTROPIC = {"spacings": [(1.0, 1.0, 1.0)], "shape": (150, 180, 144), "cases": 24}
THICK = {"spacings": [(3.0, 0.5, 0.5), (2.4, 0.5, 0.5), (3.3, 0.48, 0.48)], "shape": (46, 400, 380), "cases": 21}
LARGE = {"spacings": [(0.6, 0.6, 0.6), (0.6, 0.58, 0.6)], "shape": (260, 330, 280), "cases": 12}
STORED = {
    "isotropic": task(**ISOTROPIC),
    "isotropic whole": task([(1.0, 1.0, 1.0)], (182, 218, 182), 15, relative=0.9),
    "isotropic ResEncM": task(**ISOTROPIC, planner="nnUNetPlannerResEncM"),
    "isotropic ResEncL": task(**ISOTROPIC, planner="nnUNetPlannerResEncL"),
    "thick slices": task(**THICK, relative=0.75),
    "thick slices ResEncM": task(**THICK, planner="nnUNetPlannerResEncM", seed=5),
    "thin among thick": task([(4.0, 1.0, 1.1)] * 3 + [(0.9, 1.0, 1.1)], (40, 256, 240), 30, seed=1),
    "sagittal": task([(1.0, 0.9, 5.0), (1.1, 0.9, 4.4)], (230, 240, 34), 9, relative=0.4, seed=2),
    "tiny": task([(1.0, 1.2, 1.0)], (22, 26, 18), 40, channels=("CT", "noNorm", "T2w"), classes=5),
    "large": task(**LARGE),
    "large thick": task([(1.5, 0.4, 0.4)], (130, 640, 600), 8),
    "wide": task([(6.0, 0.3, 0.3)], (18, 980, 900), 25),
    "wide ResEncM": task([(6.0, 0.3, 0.3)], (18, 980, 900), 25, planner="nnUNetPlannerResEncM"),
    "large ResEncXL": task(**LARGE, planner="nnUNetPlannerResEncXL"),
}


def random_task(seed):
    rng = np.random.default_rng(1000 + seed)
    return task(
        [
            tuple(rng.choice([0.45, 0.6, 0.8984375, 1.0, 1.2, 2.0, 4.0, 6.0], 3).tolist())
            for _ in range(rng.integers(1, 4))
        ],
        rng.choice([17, 33, 60, 120, 190, 420], 3),
        int(rng.integers(1, 60)),
        relative=float(rng.uniform(0.3, 1)),
        channels=rng.choice(["FLAIR", "CT", "nonorm", "rescale_to_0_1", "T1w"], rng.integers(1, 4)).tolist(),
        planner=["ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL"][seed % 3],
        classes=int(rng.integers(2, 5)),
        seed=seed,
    )


# ---- in nnunetv2's process ------------------------------------------------------------------------------------------------------


def dataset_folders(described):
    """A data set of this description, without files, in nnU-Net's folders; those of an earlier one are removed."""
    raw, preprocessed = (Path(os.environ[name]) / DATASET for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw, preprocessed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(described))
    return raw, preprocessed


def nnunet_plans(given):
    import torch
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners as residual,
    )

    _, preprocessed = dataset_folders(
        {
            "channel_names": dict(enumerate(given["channel_names"])),
            "labels": {f"label {i}" if i else "background": i for i in range(given["classes"])},
            "numTraining": len(given["fingerprint"]["spacings"]),
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
            "dataset": {"case": {"images": ["case_0000.nii.gz"], "label": "case.nii.gz"}},
        }
    )
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(given["fingerprint"]))
    planner = getattr(residual, given["planner"], ExperimentPlanner)(1)
    with torch.device("meta"):  # it builds networks to measure their feature maps; without memory that is fast
        planner.plan_experiment()
    return json.loads((preprocessed / f"{planner.plans_identifier}.json").read_text())


def nnunet_fingerprint(images, samples):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    channels = len(next(iter(images.values()))["images"])
    described = {
        "channel_names": {str(c): f"channel {c}" for c in range(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
        "dataset": images,
    }
    _, preprocessed = dataset_folders(described)
    extractor = DatasetFingerprintExtractor(1, num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats = samples
    extractor.run()
    return json.loads((preprocessed / "dataset_fingerprint.json").read_text())


def nnunet_trainer(plans):
    """What its trainer, given `plans`, would do."""
    import torch
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    described = {"channel_names": {"0": "FLAIR", "1": "T1w"}, "labels": {"background": 0, "lesion": 1}}
    plans["continue_training"] = False  # which nnUNetv2_train adds
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, described, device=torch.device("cpu"))
    trainer.network = torch.nn.Linear(1, 1)
    optimiser, schedule = trainer.configure_optimizers()
    rates = []
    for epoch in (0, 1, 500, 999):
        schedule.step(epoch)
        rates.append(optimiser.param_groups[0]["lr"])
    loss = trainer._build_loss()

    class Loader:
        oversample_foreground_percent = trainer.oversample_foreground_percent

        def __init__(self, batch_size):
            self.batch_size = batch_size

    # the bound on the gradient is written nowhere else
    (gradient_norm,) = set(
        re.findall(r"clip_grad_norm_\(self\.network\.parameters\(\), (\d+)\)", getsource(nnUNetTrainer))
    )

    def forced(batch_size):
        return sum(nnUNetDataLoader._oversample_last_XX_percent(Loader(batch_size), i) for i in range(batch_size))

    return {
        "patch_size": list(trainer.configuration_manager.patch_size),
        "batch_size": trainer.configuration_manager.batch_size,
        "recipe": {
            "gradient_norm": float(gradient_norm),
            "learning_rate": trainer.initial_lr,
            "epochs": trainer.num_epochs,
            "iterations": trainer.num_iterations_per_epoch,
            "validation_iterations": trainer.num_val_iterations_per_epoch,
            "foreground": trainer.oversample_foreground_percent,
            "dice_weight": loss.loss.weight_dice,
            "cross_entropy_weight": loss.loss.weight_ce,
            "dice_smooth": loss.loss.dc.smooth,
            **{name: optimiser.param_groups[0][name] for name in ("momentum", "nesterov", "weight_decay")},
        },
        "batch_dice": loss.loss.dc.batch_dice,
        "rates": rates,
        "forced": [forced(n) for n in range(1, 13)],
        "weights": [float(w) for w in loss.weight_factors],
    }


JOBS = {"plans": nnunet_plans, "fingerprint": nnunet_fingerprint, "trainer": nnunet_trainer}

# ---- in the tests' process ------------------------------------------------------------------------------------------------------


def run_nnunet(jobs):
    """The results of `jobs`, (function, arguments) each, from a process whose environment names empty folders for nnU-Net."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {f"nnUNet_{what}": str(scratch / what) for what in ("raw", "preprocessed", "results")}
        (scratch / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, "-W", "ignore", __file__, str(scratch / "jobs.json"), str(scratch / "out.json")]
        done = subprocess.run(
            command, env=os.environ | folders | {"nnUNet_compile": "f"}, capture_output=True, text=True, cwd=scratch
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((scratch / "out.json").read_text())


def make_fixture():
    """Each stored task with nnunetv2's plans, as the text of the file."""
    plans = run_nnunet([("plans", [given]) for given in STORED.values()])
    lines = [json.dumps({"name": n, **STORED[n], "plans": p}) for n, p in zip(STORED, plans, strict=True)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def planned(given):
    from training.fingerprint import Fingerprint
    from training.nnunet_planner import make_plans

    found = Fingerprint.from_dict(given["fingerprint"], "task")
    return make_plans(found, given["channel_names"], classes=given["classes"], planner=given["planner"])


@pytest.fixture(autouse=True)
def _needs_nnunet():
    pytest.importorskip("nnunetv2")


def test_the_fixture_is_nnunets():
    assert json.loads(make_fixture()) == json.loads(FIXTURE.read_text())


def test_random_plans():
    """The whole content of plans.json: every configuration, patch, batch, network, normalisation, spacing."""
    tasks = [random_task(seed) for seed in range(12)]
    outcomes = run_nnunet([("plans", [given]) for given in tasks])
    for given, expected in zip(tasks, outcomes, strict=True):
        assert json.loads(json.dumps(planned(given))) == expected


def test_fingerprint(tmp_path):
    from training.fingerprint import LoadedCase, take_fingerprint
    from xaiseg.imaging import write

    rng = np.random.default_rng(0)
    files, cases = {}, []
    for number, (shape, spacing) in enumerate([((15, 20, 11), (0.7, 1.1, 3.0)), ((12, 13, 14), (1.0, 0.9, 1.25))]):
        image = rng.normal(100, 30, (*shape, 2)).astype(np.float32)
        image[:3], image[..., -2:, :], image[:, 5] = 0, 0, 0
        image[..., 1] *= rng.uniform(size=shape) < 0.7
        reference = (rng.uniform(size=shape) < 0.1).astype(np.uint8)  # some lesions outside the image, and in its zeros
        affine = np.diag([*spacing, 1.0])
        paths = [str(tmp_path / f"case{number}_{c}.nii.gz") for c in range(2)]
        for channel, path in enumerate(paths):
            write(path, image[..., channel], affine)
        write(tmp_path / f"case{number}.nii.gz", reference, affine)
        files[f"case{number}"] = {"images": paths, "label": str(tmp_path / f"case{number}.nii.gz")}
        cases.append(LoadedCase(image, reference, spacing))
    (expected,) = run_nnunet([("fingerprint", [files, 30_001])])
    found = take_fingerprint(iter(cases), count=2, samples=30_001).to_dict()
    assert found["shapes_after_crop"] == expected["shapes_after_crop"]
    assert found["median_relative_size_after_cropping"] == expected["median_relative_size_after_cropping"]
    np.testing.assert_allclose(found["spacings"], expected["spacings"], rtol=1e-7)  # float32 in the header
    name = "foreground_intensity_properties_per_channel"
    assert found[name].keys() == expected[name].keys()
    for channel, values in expected[name].items():
        assert found[name][channel] == pytest.approx(values, rel=2e-6)  # nnU-Net's sums are float32


def test_recipe_and_our_plans_in_nnunets_trainer():
    from training.nnunet_plan import training_plan

    names = ("isotropic", "thick slices", "large", "tiny")
    ours = [planned(STORED[name]) for name in names]
    for plans, expected in zip(ours, run_nnunet([("trainer", [plans]) for plans in ours]), strict=True):
        plan = training_plan(plans)
        recipe = plan.recipe
        assert {name: getattr(recipe, name) for name in expected["recipe"]} == expected["recipe"]
        assert [recipe.learning_rate_at(epoch) for epoch in (0, 1, 500, 999)] == pytest.approx(expected["rates"])
        assert [recipe.foreground_patches(n) for n in range(1, 13)] == expected["forced"]
        assert list(plan.deep_supervision_weights) == pytest.approx(expected["weights"])
        assert (list(plan.patch_size), plan.batch_size) == (expected["patch_size"], expected["batch_size"])
        assert plan.batch_dice == expected["batch_dice"]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        results = [JOBS[name](*arguments) for name, arguments in json.loads(Path(sys.argv[1]).read_text())]
        Path(sys.argv[2]).write_text(json.dumps(results))
    else:
        FIXTURE.write_text(make_fixture())
