"""What nnU-Net's plans.json says about one configuration: the network, the patch and the preprocessing.

Plans up to nnU-Net 2.3 lack `architecture`; it is rebuilt as nnunetv2's `ConfigurationManager` does. Everything per axis is in
nnU-Net's order: the file's axes in reverse, then `transpose_forward`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xaiseg.errors import InputError
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing
from xaiseg.models.nnunet import PlainConvUNet, ResidualEncoderUNet

NETWORKS = {"PlainConvUNet": "plain_conv_unet", "ResidualEncoderUNet": "residual_encoder_unet"}
_MODULES = {"plain_conv_unet": PlainConvUNet, "residual_encoder_unet": ResidualEncoderUNet}
_PER_STAGE = {
    "plain_conv_unet": ("convs", "n_conv_per_stage"),
    "residual_encoder_unet": ("blocks", "n_blocks_per_stage"),
}
_ORIENTATION = {
    "NibabelIOWithReorient": "RAS",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIO": "native",
    "SimpleITKIO": "native",
}
_ACTIVATIONS = {"LeakyReLU": "leakyrelu", "ReLU": "relu", "GELU": "gelu", "SiLU": "swish"}
# Arguments that other values than these would make another network of, and arguments that change nothing in inference.
_FIXED = {"nonlin_first": False, "bottleneck_channels": None}
_IGNORED = ("dropout_op", "dropout_op_kwargs", "deep_supervision")


class Plan(NamedTuple):
    """One configuration.

    architecture, options: of the network, `out_channels` left out. patch_size: 3 sides, or 2 of a 2-D configuration.
    preprocessing: what `NnunetPreprocessing.from_dict` takes.
    """

    architecture: str
    options: dict[str, Any]
    patch_size: list[int]
    preprocessing: dict[str, Any]


def read_plan(plans: Mapping[str, Any], configuration: str, dataset: Mapping[str, Any], source: str) -> Plan:
    """The plan of `configuration`, what it inherits included. source: for messages.

    Raises InputError for what is missing, what cannot be run here (cascades, other networks, readers and preprocessors than
    nnU-Net's own) and what does not fit together.
    """
    content = _configuration(plans, configuration, source)
    if content.get("previous_stage") is not None:
        raise InputError(
            f"{source}: configuration {configuration!r} is the second stage of a cascade, after {content['previous_stage']!r}; "
            "only single networks can be converted: train or take 3d_fullres"
        )
    for owner, name, expected in (
        (content, "preprocessor_name", "DefaultPreprocessor"),
        (plans, "label_manager", "LabelManager"),
    ):
        if owner.get(name, expected) != expected:
            raise InputError(
                f"{source}: {name} is {owner[name]!r}, expected {expected!r}; only nnU-Net's own is known here"
            )
    patch_size = _take(content, "patch_size", configuration, source)
    if not _is_ints(patch_size) or len(patch_size) not in (2, 3):
        raise InputError(
            f"{source}: patch_size is {patch_size!r}, expected 2 or 3 sides in voxels; take the original file"
        )
    planned = (
        content["architecture"] if "architecture" in content else _old_architecture(content, configuration, source)
    )
    architecture, options = _network(planned, len(patch_size), source)
    try:
        _MODULES[architecture](**options).check(patch_size)
    except ValueError as error:
        raise InputError(f"{source}: configuration {configuration!r}: {error}; take the original file") from error
    preprocessing = _preprocessing(plans, content, configuration, dataset, source)
    return Plan(architecture, options, list(patch_size), preprocessing)


def difference(a: Plan, b: Plan) -> str | None:
    """The first field in which two plans differ and its two values; None where they agree."""
    one, other = _flat(a), _flat(b)
    for name in {**one, **other}:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} against {other.get(name)!r}"
    return None


def _flat(plan: Plan) -> dict[str, Any]:
    return {"network": plan.architecture, "patch_size": plan.patch_size, **plan.options, **plan.preprocessing}


def _configuration(plans: Mapping[str, Any], name: str, source: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    known = plans.get("configurations")
    if not isinstance(known, Mapping) or not isinstance(known.get(name), Mapping):
        there = ", ".join(map(repr, known)) if isinstance(known, Mapping) else "none"
        raise InputError(f"{source}: no configuration {name!r} (there: {there}); take the plans.json of this training")
    content = dict(known[name])
    parent = content.pop("inherits_from", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise InputError(
            f"{source}: configuration {name!r} inherits_from {parent!r}, expected a name; take the original file"
        )
    if parent in (*heirs, name):
        raise InputError(f"{source}: configuration {name!r} inherits from itself; take the original file")
    return _configuration(plans, parent, source, (*heirs, name)) | content


def _old_architecture(content: Mapping[str, Any], configuration: str, source: str) -> dict[str, Any]:
    def take(name: str) -> Any:
        return _take(content, name, configuration, source)

    encoder = take("n_conv_per_stage_encoder")
    kind, ndim = take("UNet_class_name"), len(content["patch_size"])
    base, most = take("UNet_base_num_features"), take("unet_max_num_features")
    if not _is_ints(encoder) or not _is_ints([base, most]):
        raise InputError(
            f"{source}: n_conv_per_stage_encoder, UNet_base_num_features or unet_max_num_features of {configuration!r} are not "
            "whole numbers; take the original file"
        )
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**i, most) for i in range(len(encoder))],
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": take("conv_kernel_sizes"),
            "strides": take("pool_op_kernel_sizes"),
            "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage": encoder,
            "n_conv_per_stage_decoder": take("n_conv_per_stage_decoder"),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }


def _network(planned: Any, ndim: int, source: str) -> tuple[str, dict[str, Any]]:
    kwargs = planned.get("arch_kwargs") if isinstance(planned, Mapping) else None
    if not isinstance(kwargs, Mapping):
        raise InputError(
            f"{source}: architecture is {planned!r}, expected a class name and arch_kwargs; take the original file"
        )
    class_name = str(planned.get("network_class_name"))
    package, _, kind = class_name.rpartition(".")
    if not package.startswith("dynamic_network_architectures.") or kind not in NETWORKS:
        raise InputError(
            f"{source}: the network is {class_name!r}; only {' and '.join(NETWORKS)} of dynamic_network_architectures "
            "can be converted"
        )
    architecture = NETWORKS[kind]
    encoder, planned_encoder = _PER_STAGE[architecture]
    if kwargs.get("block") is not None and str(kwargs["block"]).rpartition(".")[2] != "BasicBlockD":
        raise InputError(f"{source}: the network has blocks {kwargs['block']!r}; only BasicBlockD can be converted")
    if bad := [name for name, value in _FIXED.items() if kwargs.get(name, value) != value]:
        raise InputError(
            f"{source}: the network has {bad[0]} {kwargs[bad[0]]!r}; only {_FIXED[bad[0]]!r} can be converted"
        )
    read = {"n_stages", "features_per_stage", "kernel_sizes", "strides", planned_encoder, "n_conv_per_stage_decoder"}
    read |= {
        "conv_op",
        "conv_bias",
        "norm_op",
        "norm_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
        "block",
        *_FIXED,
        *_IGNORED,
    }
    if architecture == "residual_encoder_unet":
        read.add("stem_channels")
    if unknown := sorted(set(kwargs) - read):
        raise InputError(
            f"{source}: the network has {unknown[0]} {kwargs[unknown[0]]!r}, which {kind} is not known to have here"
        )
    if str(kwargs.get("conv_op")).rpartition(".")[2] != f"Conv{ndim}d":
        raise InputError(
            f"{source}: conv_op is {kwargs.get('conv_op')!r} for a patch_size of {ndim} sides; take the original file"
        )

    n: Any = kwargs.get("n_stages")
    if not _is_ints([n]):
        raise InputError(f"{source}: n_stages is {n!r}, expected a whole number; take the original file")

    def per_stage(name: str, stages: int, axes: int | None = None) -> list[Any]:
        value = kwargs.get(name)
        stages_of: Any = [value] * stages if isinstance(value, int) else value
        if axes is not None and isinstance(stages_of, Sequence):
            stages_of = [[v] * axes if isinstance(v, int) else v for v in stages_of]
        fits = isinstance(stages_of, Sequence) and len(stages_of) == stages
        if not fits or not all(_is_ints([v] if axes is None else v, axes or 1) for v in stages_of):
            expected = f"{stages} whole numbers" if axes is None else f"{stages} times {axes} whole numbers"
            raise InputError(f"{source}: {name} is {value!r}, expected {expected}; take the original file")
        return [v if axes is None else list(v) for v in stages_of]

    options: dict[str, Any] = {
        "features": per_stage("features_per_stage", n),
        "kernel_sizes": per_stage("kernel_sizes", n, ndim),
        "strides": per_stage("strides", n, ndim),
        # nnU-Net's decoder counts from the bottom
        "decoder_convs": per_stage("n_conv_per_stage_decoder", n - 1)[::-1],
        encoder: per_stage(planned_encoder, n),
        "conv_bias": bool(kwargs.get("conv_bias", False)),
        "norm": _norm(kwargs, ndim, source),
        "activation": _activation(kwargs, source),
        "ndim": ndim,
    }
    if kwargs.get("stem_channels") is not None:
        if not _is_ints([kwargs["stem_channels"]]):
            raise InputError(f"{source}: stem_channels is {kwargs['stem_channels']!r}, expected a whole number")
        options["stem_features"] = kwargs["stem_channels"]
    return architecture, options


def _norm(kwargs: Mapping[str, Any], ndim: int, source: str) -> str:
    kind, given = _operation(kwargs, "norm_op")
    if kind is None:
        return "none"
    batch = kind == f"BatchNorm{ndim}d"
    affine, tracked = given.pop("affine", batch), given.pop("track_running_stats", batch)
    given.pop("momentum", None)
    if given.pop("eps", 1e-5) != 1e-5 or given or tracked != batch or (batch and not affine):
        raise InputError(
            f"{source}: norm_op_kwargs is {kwargs['norm_op_kwargs']!r} for {kind!r}; only an eps of 1e-05 and, besides affine, the "
            "defaults can be converted"
        )
    if not batch and kind != f"InstanceNorm{ndim}d":
        raise InputError(
            f"{source}: norm_op is {kind!r}; only InstanceNorm{ndim}d, BatchNorm{ndim}d and none can be converted"
        )
    return "batch" if batch else "instance_affine" if affine else "instance"


def _activation(kwargs: Mapping[str, Any], source: str) -> str:
    kind, given = _operation(kwargs, "nonlin")
    given.pop("inplace", None)
    defaults: dict[str, dict[str, Any]] = {"LeakyReLU": {"negative_slope": 0.01}, "GELU": {"approximate": "none"}}
    default = defaults.get(kind or "", {})
    if kind not in _ACTIVATIONS or {**default, **given} != default:
        raise InputError(
            f"{source}: nonlin is {kwargs.get('nonlin')!r} with {kwargs.get('nonlin_kwargs')!r}; only "
            f"{', '.join(_ACTIVATIONS)} with PyTorch's defaults can be converted"
        )
    return _ACTIVATIONS[kind]


def _operation(kwargs: Mapping[str, Any], name: str) -> tuple[str | None, dict[str, Any]]:
    """Class name of an operation, without its modules, and its arguments."""
    path, given = kwargs.get(name), kwargs.get(f"{name}_kwargs")
    return None if path is None else str(path).rpartition(".")[2], dict(given) if isinstance(given, Mapping) else {}


def _preprocessing(
    plans: Mapping[str, Any], content: Mapping[str, Any], configuration: str, dataset: Mapping[str, Any], source: str
) -> dict[str, Any]:
    def take(name: str, kind: type = object) -> Any:
        return _take(content, name, configuration, source, kind)

    # inference reads images with the class in the plans; the data set's choice went into them
    reader = plans.get("image_reader_writer") or dataset.get("overwrite_image_reader_writer")
    if not isinstance(reader, str) or reader not in _ORIENTATION:
        raise InputError(
            f"{source}: images were read with {reader!r}; only with {', '.join(_ORIENTATION)} is the orientation known"
        )
    schemes = take("normalization_schemes")
    now, before = (f"foreground_intensity_properties_{name}" for name in ("per_channel", "by_modality"))
    properties = _take(plans, now if now in plans or before not in plans else before, None, source, Mapping)
    given = {
        "orientation": _ORIENTATION[reader],
        "transpose_forward": _take(plans, "transpose_forward", None, source),
        "spacing": take("spacing"),
        "normalisation": schemes,
        "use_mask_for_norm": take("use_mask_for_norm"),
        "intensities": [properties.get(str(c), {}) for c in range(len(schemes) if isinstance(schemes, list) else 0)],
        **{
            ours: {"resampling_fn": take(theirs), **take(f"{theirs}_kwargs", Mapping)}
            for ours, theirs in (
                ("data_resampling", "resampling_fn_data"),
                ("probability_resampling", "resampling_fn_probabilities"),
            )
        },
    }
    return NnunetPreprocessing.from_dict(given, source).to_dict()


def _take(content: Mapping[str, Any], name: str, configuration: str | None, source: str, kind: type = object) -> Any:
    found = content.get(name)
    if name not in content or not isinstance(found, kind):
        where = f" in configuration {configuration!r}" if configuration else ""
        what = f"{found!r}, expected an object" if name in content else "missing"
        raise InputError(f"{source}: {name} is {what}{where}; take the plans.json of this training")
    return found


def _is_ints(value: Any, count: int | None = None) -> bool:
    return (
        isinstance(value, list | tuple) and count in (None, len(value)) and all(type(v) is int and v > 0 for v in value)
    )
