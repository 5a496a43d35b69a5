"""The parts of `scripts/benchmark.py`: what is measured of one window, of whole lesions, of a scan."""
