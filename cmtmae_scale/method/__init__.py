"""CMT-MAE itself: everything that can be checked against the paper."""
