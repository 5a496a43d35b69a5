"""The colours of the overlay, by the numbers of their colour map."""

import numpy as np

from xaiseg.report.canvas import OPAQUE_FROM, overlay_colours


def test_opacity_grows_from_nothing_and_the_sign_gives_the_hue():
    size = np.linspace(0, 1, 50)
    for side, strong, weak in ((0.5 + size / 2, 0, 2), (0.5 - size / 2, 2, 0)):
        rgba = overlay_colours(signed=True)(side)
        assert (np.diff(rgba[:, 3]) >= 0).all()
        assert rgba[0, 3] < 0.02
        assert np.ptp(rgba[size > OPAQUE_FROM + 0.01, 3]) == 0
        assert (rgba[1:, strong] > rgba[1:, weak]).all()
    np.testing.assert_array_equal(overlay_colours(signed=False)(size)[-1], overlay_colours(signed=True)(1.0))
