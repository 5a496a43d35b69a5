"""Make the reference arrays of `tests/fixtures` with PyTorch and MONAI, so that the ordinary tests need neither.

    pip install 'xaiseg[parity]'
    python scripts/make_fixtures.py

Everything is computed in float64, so that a difference seen in a test is ours. Arrays are stored channels last.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
WINDOW = (16, 16, 16)
OVERLAP = 0.25
LAYER = "model.1.submodule.2.conv"
ROWS_SHAPE = (18, 20, 17)  # starts {0, 2} × {0, 4} × {0, 1}: eight windows
# In C order. The first lies in the first window only, the second in all eight, the third in one or two.
LESIONS = {
    "one": [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)],
    "eight": [(7, 9, 8), (8, 8, 8), (8, 9, 8), (8, 9, 9), (8, 10, 8), (9, 9, 8)],
    "border": [(0, 3, 0), (1, 3, 0), (1, 4, 0), (2, 3, 0), (2, 4, 0)],
}


def network(seed: int, channels: tuple[int, ...], **options) -> UNet:
    """A UNet with random weights, random slopes and, where it has them, random statistics."""
    torch.manual_seed(seed)
    options = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "norm": "batch", **options}
    net = UNet(channels=channels, strides=(2,) * (len(channels) - 1), num_res_units=0, **options)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("adn.N.weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("adn.N.bias", "running_mean")):
                value.normal_(0, 0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.3, 2)
            elif name.endswith("adn.A.weight"):
                value.uniform_(0.05, 0.4)
    return net.eval()


def volume(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, rounded to float16 to be small on disk and exact in any precision."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 0)[None].astype(np.float64))


def to_numpy(y: torch.Tensor) -> np.ndarray:
    return np.moveaxis(y.detach().numpy()[0], 0, -1).astype(np.float32)


def stitched(net: torch.nn.Module, x: torch.Tensor, mode: str = "gaussian") -> torch.Tensor:
    return sliding_window_inference(x, WINDOW, 1, net, overlap=OVERLAP, mode=mode)


def checkpoints() -> None:
    nets = {
        "unet_batch": (network(0, (4, 8, 16)), (12, 8, 16, 2)),
        "unet_instance_affine": (network(1, (4, 8), norm=("instance", {"affine": True})), (8, 10, 6, 2)),
        "unet_instance": (network(2, (4, 8), in_channels=1, norm="instance"), (8, 10, 6, 1)),
        "unet_2d": (network(3, (4, 8), spatial_dims=2, out_channels=3), (8, 10, 2)),
    }
    for seed, (name, (net, shape)) in enumerate(nets.items()):
        torch.save(net.state_dict(), FIXTURES / f"{name}.pth")
        x = volume(10 + seed, shape)
        np.savez_compressed(FIXTURES / f"{name}.npz", x=x, y=to_numpy(net.double()(to_torch(x))))
    wrapped = {f"module._orig_mod.{name}": value for name, value in nets["unet_2d"][0].float().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, FIXTURES / "unet_module_prefix.pth")


def transposed_convolutions() -> None:
    """(kernel, stride, padding, output padding, channels in, channels out)"""
    cases = [
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 3, 2),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0), 2, 3),
        ((3, 3, 1), (1, 2, 2), (1, 1, 0), (0, 1, 1), 2, 2),
        ((4, 3, 2), (3, 2, 1), (1, 1, 0), (2, 0, 0), 10, 1),
    ]
    torch.manual_seed(4)
    arrays = {}
    for i, (k, s, p, extra, c_in, c_out) in enumerate(cases):
        x = torch.randn(2, c_in, 4, 3, 5, dtype=torch.float64)
        weight = torch.randn(c_in, c_out, *k, dtype=torch.float64)
        y = F.conv_transpose3d(x, weight, stride=s, padding=p, output_padding=extra)
        arrays |= {f"x{i}": x.numpy(), f"weight{i}": weight.numpy(), f"y{i}": y.numpy()}
        arrays[f"geometry{i}"] = np.array([s, p, extra])
    arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    np.savez_compressed(FIXTURES / "conv_transpose.npz", **arrays)


def stitched_logits(net: torch.nn.Module) -> None:
    """Odd sizes, below and above the window."""
    for name, shape, mode in [("below", (19, 23, 13), "gaussian"), ("above", (21, 17, 18), "constant")]:
        x = volume(20, (*shape, 2))
        with torch.no_grad():
            y = to_numpy(stitched(net, to_torch(x), mode))
        np.savez_compressed(FIXTURES / f"stitched_{name}.npz", x=x, y=y)


def jacobian_rows(net: torch.nn.Module) -> None:
    """One autograd call for each voxel of a lesion, through the whole stitched prediction."""
    image = volume(30, (*ROWS_SHAPE, 2))
    x = to_torch(image).requires_grad_()
    y = stitched(net, x)[0, 1]
    arrays = {"x": image}
    for name in ("one", "eight"):
        rows = torch.stack([torch.autograd.grad(y[v], x, retain_graph=True)[0][0] for v in LESIONS[name]])
        largest = rows.abs().argmax(0, keepdim=True)
        arrays[f"{name}_signed_max"] = to_numpy(rows.gather(0, largest))
        arrays[f"{name}_mean"] = to_numpy(rows.mean(0, keepdim=True))
    for name, voxels in LESIONS.items():
        arrays[f"{name}_voxels"] = np.array(voxels, np.int32)
    for aggregate in ("signed_max", "mean"):
        np.savez_compressed(
            FIXTURES / f"rows_{aggregate}.npz",
            **{k: v for k, v in arrays.items() if k == "x" or k.endswith(("voxels", aggregate))},
        )


def gradcam_pp(net: torch.nn.Module) -> None:
    """Equations 8 to 10 of the paper, term by term, for the derivatives of Y = exp(y'), whose common factor cancels."""
    image = volume(30, (*ROWS_SHAPE, 2))
    kept = {}
    net.get_submodule(LAYER).register_forward_hook(lambda module, inputs, output: kept.update(A=output))
    arrays = {"x": image}
    for name in ("one", "border"):
        voxels = np.array(LESIONS[name])
        total = torch.zeros(ROWS_SHAPE, dtype=torch.float64)
        for start, cotangent in window_shares(voxels):
            if not cotangent.any():
                continue
            at = tuple(slice(s, s + w) for s, w in zip(start, WINDOW, strict=True))
            target = (net(to_torch(image[at]))[0, 1] * cotangent).sum()  # eq. 9, as far as this window has a say in it
            g = torch.autograd.grad(target, kept["A"])[0][0]
            A = kept["A"][0].detach()
            second, third = g**2, g**3
            alpha = second / (2 * second + A.sum((1, 2, 3), keepdim=True) * third)  # eq. 8
            omega = torch.where(g > 0, alpha * torch.relu(g), torch.zeros_like(g))
            cam = torch.relu((omega * A).sum(0))  # eq. 10
            total[at] += F.interpolate(cam[None, None], WINDOW, mode="trilinear", align_corners=False)[0, 0]
        arrays |= {name: total.numpy().astype(np.float32), f"{name}_voxels": voxels.astype(np.int32)}
    np.savez_compressed(FIXTURES / "gradcam_pp.npz", **arrays)


def window_shares(voxels: np.ndarray) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Per window its start and ∂y'/∂(its logits), by autograd through MONAI's stitching of a constant."""
    parts: list[torch.Tensor] = []

    def record(window: torch.Tensor) -> torch.Tensor:
        corner = window[0, :, 0, 0, 0]
        logits = torch.zeros(1, 1, *WINDOW, dtype=torch.float64, requires_grad=True)
        parts.append(logits)
        starts.append(tuple(int(c) for c in corner))
        return logits * 1  # MONAI scales it in place, which a leaf does not allow

    starts: list[tuple[int, ...]] = []
    coordinates = torch.from_numpy(np.indices(ROWS_SHAPE).astype(np.float64))[None]
    blended = stitched(record, coordinates)[0, 0]
    target = sum(blended[tuple(v)] for v in voxels)
    shares = torch.autograd.grad(target, parts)
    return [(start, share[0, 0]) for start, share in zip(starts, shares, strict=True)]


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    checkpoints()
    transposed_convolutions()
    tiny = network(0, (4, 8, 16)).double()
    stitched_logits(tiny)
    jacobian_rows(tiny)
    gradcam_pp(tiny)
    for file in sorted(FIXTURES.iterdir()):
        print(f"{file.stat().st_size / 1024:7.1f} KiB  {file.name}")
