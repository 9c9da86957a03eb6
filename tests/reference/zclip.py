"""ZClip with a buffer for its first norms, in plain Python floats."""

import numpy as np


class Filter:
    def __init__(self, *, alpha=0.97, z_thresh=2.5, max_grad_norm=1.0, warmup_steps=25, mode="zscore",
                 clip_option="adaptive_scaling", clip_factor=1.0, skip_update_on_spike=False):  # fmt: skip
        self.alpha, self.z_thresh, self.most, self.warmup = alpha, z_thresh, max_grad_norm, warmup_steps
        self.mode, self.option, self.factor, self.skip = mode, clip_option, clip_factor, skip_update_on_spike
        self.first, self.mean, self.var = [], 0.0, 0.0

    def target(self, norm):
        """What a spike is brought down to; None for others."""
        std = np.sqrt(self.var)
        if self.mode == "percentile":
            bound = self.mean + self.z_thresh * std
            return bound if norm > bound else None
        z = (norm - self.mean) / (std + 1e-6)
        if z <= self.z_thresh:
            return None
        return (
            self.mean
            if self.option == "mean"
            else (self.mean + self.z_thresh * std / (z / self.z_thresh)) * self.factor
        )

    def __call__(self, grads, states):
        norm = float(np.sqrt(sum((g * g).astype(np.float64).sum() for g in grads)))
        if not np.isfinite(norm):  # of finite entries: their squares overflow
            finite = all(np.isfinite(g).all() for g in grads)
            return [np.zeros_like(g) for g in grads] if finite else grads
        target = None
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean, self.var = np.mean(self.first), np.var(self.first)
        else:
            target = self.target(norm)
            if target is None or not self.skip:
                seen = norm if target is None else target
                self.mean = self.alpha * self.mean + (1 - self.alpha) * seen
                self.var = self.alpha * self.var + (1 - self.alpha) * (seen - self.mean) ** 2
        most = min(x for x in (target, self.most, np.inf) if x is not None)
        return [(g * (most / (norm + 1e-6))).astype(g.dtype) if norm > most else g for g in grads]
