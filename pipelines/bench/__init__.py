"""What is it worth? Presets beside their controls, other libraries and the oracle, with the bars that they must meet."""
