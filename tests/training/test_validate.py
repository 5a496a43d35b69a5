import jax
import jax.numpy as jnp
import numpy as np

from training.config import Config
from training.validate import validate
from training.volumes import make_volume
from xaiseg.models import Model, expected_variables


def test_scores_of_a_network_that_thresholds_the_first_channel(tiny: Config) -> None:
    """A 1 x 1 x 1 network whose lesion logit is the intensity: every count can be read off the image."""
    spec = tiny.spec(0.5)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), expected_variables(spec))
    shape = (16, 16, 16)
    cases = []
    for found, missed, false in ((2, 1, 1), (1, 0, 0)):
        image, reference = np.zeros((*shape, 2), np.float32), np.zeros(shape, bool)
        for i in range(found + missed + false):
            voxel = (4 * i, 8, 8)
            image[voxel] = 1.0 if i < found or i >= found + missed else 0.0
            reference[voxel] = i < found + missed
        cases.append(make_volume("case", image, reference))
    model = _Intensity(spec, variables)
    low, high = validate(model, cases, (0.5, 0.9))
    assert (low.threshold, high.threshold) == (0.5, 0.9)
    np.testing.assert_allclose(low.dice, (4 / 6 + 1) / 2)  # TP 2, FP 1, FN 1; TP 1
    kappa = 0.999 * 3 / (0.001 * (16**3 - 3))
    np.testing.assert_allclose(low.ndsc, (4 / (kappa + 4 + 1) + 1) / 2)
    np.testing.assert_allclose((low.tpr, low.fdr), (3 / 4, 1 / 4))
    assert high[1:] == (0.0, 0.0, 0.0, 0.0)  # nothing predicted: softmax of (0, 1) is 0.73


class _Intensity(Model):
    @property
    def logits_fn(self):
        return lambda x: jnp.stack([jnp.zeros_like(x[..., 0]), x[..., 0]], axis=-1)
