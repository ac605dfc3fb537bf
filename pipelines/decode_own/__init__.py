"""Drafters that run the model itself, or parts of it, and loops of images that are written token by token."""
