"""gradkit in other people's training loops; each needs its package: `pip install gradkit[lightning]`, `[transformers]`."""
