"""Descriptions of diffusers' transformer classes, by name and family."""
