"""Drafters that are made of the model itself: heads and tokens that were trained on it, and images drafted by themselves."""
