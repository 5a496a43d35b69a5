"""Meshes of devices, and predictors placed on them. Two CPU devices are faked by conftest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh, device_of, row_shards, sample_shards

DEVICES = jax.devices()


def scaled(scale, x):
    return x * scale


def predictor(mesh):
    return StitchedPredictor(Partial(scaled, jnp.float32(2)), (4, 4, 4), target_class=0, mesh=mesh)


def where(shard):
    return next(iter(jax.tree.leaves(shard.logits_fn)[0].devices()))


def test_the_default_gives_each_device_samples_of_its_own():
    assert device_mesh().devices.shape == (2, 1)
    assert device_mesh(samples=1, rows=2).devices.shape == (1, 2)
    assert device_mesh(rows=2).devices.shape == (1, 2)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"a mesh of 3 × 1 devices: there are 2"):
        device_mesh(samples=3)


def test_shards_have_their_parameters_on_their_devices():
    shards = sample_shards(predictor(device_mesh()))
    assert [where(s) for s in shards] == [device_of(s) for s in shards] == DEVICES
    rows = row_shards(predictor(device_mesh(samples=1, rows=2)))
    assert [where(s) for s in rows] == [device_of(s) for s in rows] == DEVICES
    (sample,) = sample_shards(predictor(device_mesh(samples=1, rows=2)))
    assert len(row_shards(sample)) == 2


def test_without_a_mesh_nothing_moves():
    plain = predictor(None)
    assert sample_shards(plain) == row_shards(plain) == [plain]
    assert sample_shards(None) == [None]
    assert device_of(plain) is None


def test_a_prediction_runs_where_its_parameters_are():
    x = np.ones((4, 4, 4, 1), np.float32)
    for shard in sample_shards(predictor(device_mesh())):
        assert next(iter(shard(jax.device_put(x, device_of(shard))).devices())) == device_of(shard)
