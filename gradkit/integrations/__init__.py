"""gradkit in other people's training loops; each module needs its package: `pip install "gradkit[lightning]"`."""
