"""xaiseg beside PyTorch/MONAI on one machine, in one run, with the paper's networks and random weights.

    pip install -e '.[parity]'
    python scripts/benchmark.py                  forward pass and Jacobian rows of one 96³ window
    python scripts/benchmark.py --layers         lowerings of each layer (minutes: native is slow on CPU)
    python scripts/benchmark.py --published      whole lesions in a whole volume, beside the published algorithm
    python scripts/benchmark.py --training       a step of training: time and peak memory
    python scripts/benchmark.py --throughput     rows a second, what that is of the hardware, a real scan; needs no PyTorch

Both sides get the same weights, input and number of threads, or the same GPU in float32, and take turns, so that a busy moment hits
both; where they do not agree nothing is timed. Memory is measured in processes of their own.

`--published` explains lesions (signed maximum, one sample, no noise) and compares with `scripts/published.py`: PyTorch, where a row
goes back through all windows of the volume, or through the whole volume at once. xaiseg is timed warm; its first call, and what of
it was compilation, is printed beside. On CPU PyTorch computes the U-Net's lesions in full and two rows of the others'
(`--baseline-rows`): its time is then scaled to the lesion, and the maps of these rows are compared.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: this checkout's `scripts` and `xaiseg`

from scripts.benchmarks.networks import NETWORKS, threads  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--repeats", type=int, default=7, help="of a measurement, of which the median is printed")
    mode = parser.add_mutually_exclusive_group()
    for name in ("layers", "published", "throughput", "training"):
        mode.add_argument(f"--{name}", action="store_true")
    group = parser.add_argument_group("with --published and --throughput")
    group.add_argument("--shape", type=int, nargs=3, default=(182, 218, 182), help="of the volume")
    group.add_argument("--window", type=int, nargs=3, default=(96, 96, 96), help="smaller for a quick try")
    group.add_argument("--lesions", type=int, nargs="+", default=(20, 60, 200), help="voxels of lesions in one window")
    group.add_argument(
        "--places", nargs="*", choices=("two", "most"), default=("two", "most"), help="windows of one more lesion each"
    )
    group.add_argument(
        "--variant", nargs="+", choices=("window", "whole"), default=(), help="both for the U-Net, else window"
    )
    group.add_argument("--baseline-rows", type=int, help="of a lesion that PyTorch computes, 0 for all")
    group.add_argument("--many", type=int, help="lesions explained at once for their memory, 0 for none")
    group.add_argument("--no-peaks", action="store_true", help="measure no memory")
    group.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with a real scan and model")
    group = parser.add_argument_group("with --training")
    group.add_argument("--patch", type=int, default=64, help="side of the patches")
    group.add_argument("--batch", type=int, default=2, help="patches of a step")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    mode.add_argument("--memory", help=argparse.SUPPRESS)
    mode.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    if arguments.layers:
        from scripts.benchmarks.layers import layers

        layers(min(arguments.repeats, 3))
    elif arguments.throughput:
        from scripts.benchmarks.throughput import throughput

        say_machine(with_torch=False)
        throughput(arguments.network, tuple(arguments.window), arguments.shared, arguments.repeats)
    elif arguments.training:
        training(arguments)
    elif arguments.published or arguments.peak:
        lesions(arguments)
    elif arguments.memory:
        from scripts.benchmarks.window import memory

        memory(arguments.network[0], arguments.memory)
    else:
        windows(arguments)


def windows(arguments: argparse.Namespace) -> None:
    from scripts.benchmarks.window import compare

    say_machine()
    for network in arguments.network:
        compare(network, arguments.repeats)
        more = ("gradient", "gradient-remat", "rows-remat") if network == "swin_unetr" else ()
        for name in ("torch", "xaiseg", *more):
            command = [sys.executable, __file__, "--network", network, "--memory", name]
            # XLA's CPU scheduler trades memory for concurrency, and with it what rematerialisation saves; see the README
            sequential = " --xla_cpu_enable_concurrency_optimized_scheduler=false" if name in more else ""
            flags = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + sequential}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=flags)
            print(f"peak memory beyond imports and weights, {name}: {done.stdout.split()[-1]} MiB", flush=True)


def training(arguments: argparse.Namespace) -> None:
    from scripts.benchmarks.training import compare, print_peak

    if arguments.peak_of:
        print_peak(arguments.network[0], arguments.patch, arguments.batch, arguments.peak_of)
        return
    say_machine()
    for network in arguments.network:
        compare(network, arguments.patch, arguments.batch, arguments.repeats)


def lesions(arguments: argparse.Namespace) -> None:
    from scripts.benchmarks.peaks import print_peak
    from scripts.benchmarks.setup import Setup
    from scripts.benchmarks.whole_lesions import compare

    setup = Setup(
        tuple(arguments.shape),
        tuple(arguments.window),
        tuple(arguments.lesions),
        tuple(f"{place} windows" for place in arguments.places),
        tuple(arguments.variant),
        arguments.baseline_rows,
        arguments.many,
    )
    if arguments.peak:
        side, count, voxels = arguments.peak
        print_peak(arguments.network[0], setup, side, int(count), int(voxels))
        return
    say_machine()
    for network in arguments.network:
        compare(network, setup, peaks=not arguments.no_peaks)


def say_machine(with_torch: bool = True) -> None:
    import jax

    versions = f"jax {jax.__version__}"
    if with_torch:
        import torch

        torch.set_num_threads(threads())
        versions += f", torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{versions}, {jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f} at the start", flush=True)


if __name__ == "__main__":
    # on a GPU, JAX would otherwise take most of the memory before PyTorch has any
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        main(parse())
    except ImportError as error:
        sys.exit(f"{error}: PyTorch and MONAI are needed here: pip install -e '.[parity]'")
