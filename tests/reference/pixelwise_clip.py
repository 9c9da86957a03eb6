"""Pixelwise gradient clipping: each vector over the channels keeps its direction, and at most a norm of `limit`."""

import numpy as np


def clipped(grad, limit, channel_axis, ord):
    rows = np.moveaxis(grad, channel_axis, -1).copy()
    for pixel in np.ndindex(rows.shape[:-1]):
        norm = np.abs(rows[pixel]).max() if ord == "inf" else np.sqrt(np.square(rows[pixel]).sum())
        if norm > limit:
            rows[pixel] *= limit / norm
    return np.moveaxis(rows, -1, channel_axis)
