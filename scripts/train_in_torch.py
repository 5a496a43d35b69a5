"""A U-Net config of `training` carried out in PyTorch: the same patches, augmented the same, the same loss, optimiser and schedule.

    pip install -e '.[training,parity]'
    python scripts/train_in_torch.py --config ms_flair_t1w --data BIDS --validation CASE --seed 0 --out DIR

What differs from `python -m training` of the same seed is the first weights, which each side draws its own way, and the order of
additions. DIR/model is a model folder, so both are segmented with and evaluated by the same code.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: this checkout's `training` and `xaiseg`

from training.augment import augment  # noqa: E402
from training.cases import read_cases  # noqa: E402
from training.config import Config, load_config  # noqa: E402
from training.dataset import load_volumes  # noqa: E402
from training.loop import describe, source_of  # noqa: E402
from training.optimiser import learning_rate_of  # noqa: E402
from training.validate import validate  # noqa: E402
from xaiseg.checkpoints import monai_unet, save_model  # noqa: E402
from xaiseg.checkpoints.mapping import Given  # noqa: E402
from xaiseg.errors import InputError  # noqa: E402
from xaiseg.models import Model  # noqa: E402

_SMOOTH = 1e-5


def main() -> None:
    args = _arguments()
    settings = [*args.set, f"seed={args.seed}"]
    config = load_config(args.config, settings)
    _check(config)
    held_out = [name for name in args.validation.split(",") if name]
    cases = read_cases(args.data, held_out, config.channels)
    (args.out / "volumes").mkdir(parents=True, exist_ok=True)
    training, validation = load_volumes(config, cases, args.out / "volumes", print)
    model = Model(config.spec(config.thresholds[0], "scripts/train_in_torch.py"), _train(config, training))
    save_model(args.out / "model", model, overwrite=True)
    if validation:
        print(describe(max(validate(model, validation, config.thresholds), key=lambda s: s.ndsc)))


def _train(config: Config, training: Any) -> Any:
    """The variables of the network after the last step, as xaiseg reads them."""
    import torch
    from monai.networks.nets import UNet

    torch.manual_seed(config.seed)
    options = config.options
    net = UNet(3, len(config.channels), 2, options["channels"], options["strides"], norm="batch", num_res_units=0)
    net.train()
    optimiser = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = learning_rate_of(config)
    average = {name: value.detach().clone() for name, value in net.named_parameters()}
    keyed = jax.jit(lambda number: jax.random.fold_in(jax.random.key(config.seed), number))
    changed = jax.jit(lambda key, x, g: augment(key, x, g, config.augmentation, margin=config.margin))
    begun = time.monotonic()
    with source_of(config, training, 0) as source:
        for step in range(config.steps):
            images, references = (np.array(a) for a in changed(keyed(np.int32(step)), *map(jnp.asarray, source.next())))
            x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
            for group in optimiser.param_groups:
                group["lr"] = float(rate(step))
            optimiser.zero_grad()
            loss = _loss(config, net(x), torch.from_numpy(references.astype(np.float32)))
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for name, value in net.named_parameters():
                    average[name].lerp_(value, 1 - config.average)
            if (step + 1) % config.log_every == 0:
                seconds = (time.monotonic() - begun) / (step + 1)
                print(f"step {step + 1}/{config.steps}  loss {loss.item():.4f}  {seconds:.2f} s/step", flush=True)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    if config.average:
        state |= {name: value.numpy() for name, value in average.items()}
    return jax.tree.map(jnp.asarray, monai_unet.read(state, "PyTorch", Given()).variables)


def _loss(config: Config, logits: Any, g: Any) -> Any:
    """`training.losses` in PyTorch; `logits` `(B, 2, X, Y, Z)`, `g` `(B, X, Y, Z)`."""
    import torch

    each = torch.nn.functional.cross_entropy(logits, g.long(), reduction="none")
    p, g = torch.softmax(logits, 1)[:, 1].flatten(1), g.flatten(1)
    pairs = (p.reshape(1, -1), g.reshape(1, -1)) if config.dice_over_batch else (p, g)
    held, total = (pairs[0] * pairs[1]).sum(1), pairs[0].sum(1) + pairs[1].sum(1)
    size, voxels = g.sum(1), g.shape[1]
    kappa = (1 - config.dice_r) * size / (config.dice_r * (voxels - size).clamp(min=1))
    kappa = torch.where((size > 0) & (size < voxels), kappa, torch.ones_like(kappa))
    tp, fp, fn = (p * g).sum(1), (p * (1 - g)).sum(1), ((1 - p) * g).sum(1)
    parts = {
        "cross_entropy": each.mean(),
        "focal": ((1 - torch.exp(-each)) ** config.focal_gamma * each).mean(),
        "dice": (1 - (2 * held + _SMOOTH) / (total + _SMOOTH)).mean(),
        "normalised_dice": (1 - (2 * tp + _SMOOTH) / (kappa * fp + 2 * tp + fn + _SMOOTH)).mean(),
    }
    return sum(weight * parts[name] for name, weight in config.loss.items() if weight)


def _check(config: Config) -> None:
    """What is not written here in PyTorch is refused, not left out."""
    only = {"architecture": "unet", "optimiser": "adamw", "clip": 0.0, "accumulate": 1, "precision": "float32"}
    only |= {"focal_activation": "softmax", "planner": "", "preprocessing": {}, "phantoms": (), "synthetic": 0}
    for name, value in only.items():
        if getattr(config, name) != value:
            sys.exit(f"{name} is {getattr(config, name)!r}; this script has only {value!r}: --set {name}={value}")
    if unknown := sorted(set(config.options) - {"channels", "strides", "norm"}):
        sys.exit(f"options.{unknown[0]} is not in this script; expected channels, strides and norm only")
    if config.schedule == "plateau" or config.loss.get("blob") or config.options.get("norm") != "batch":
        sys.exit("plateau, blob loss and norms other than batch are not in this script")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", action="append", default=[], type=Path, required=True)
    parser.add_argument("--validation", default="", metavar="CASE,CASE", help="cases to hold out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
