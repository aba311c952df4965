"""Programs for developers: the demo model's training, its data and the sample images."""
