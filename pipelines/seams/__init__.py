"""How is work left out of an unmodified network? A seam per level of `hasten.caching`; gates stand in for its modules.

`denoiser_gate` is the way in: every call of the network passes it, and it opens the seam that the recipe asks for.
`stack`, `modules`, `deep`, `width`, `network` and `context` serve the policies of the file of that name in `caching/`,
`guidance` those of `samplers/`. A seam learns the network's structure and proves on it that skipping loses nothing
(`proof`), or falls back; the gates (`..._gate`) do the skipping.
"""
