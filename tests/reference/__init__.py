"""What each optimizer and transform computes, written once more from its paper in plain numpy; nothing of gradkit."""
