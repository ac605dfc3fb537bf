"""How does a diffusion network read less? The attention seam: its calls are found, measured, and made sparse.

`seam` is what the denoiser gate opens; `sites` are the attention modules it puts `processors` on; `tokens`, `grids` and
`masks` say what a call's tokens are, `gain` whether sparse attention pays, `ranks` what several processes share, `facts`
what the trace is told.
"""
