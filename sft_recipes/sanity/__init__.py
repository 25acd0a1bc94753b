"""The sanity check: a trial run of a few steps before every training run."""
