"""Autoregressive decoding: what is proposed, how it is verified, and how much of it is worth trying."""
