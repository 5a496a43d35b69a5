"""Train a segmentation network that `xaiseg` can explain: `python -m training --help`."""
