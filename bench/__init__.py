"""Step times of optimizers on real models' shapes, as ratios in one run: `python -m bench`."""
