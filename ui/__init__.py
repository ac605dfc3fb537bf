"""How does a person run a generation and look at it in a browser? A job engine and its views.

Holds nothing yet; use the command line. This is the only folder that may import gradio, and it stands above
`pipelines` and `distill`: nothing imports it except the command line, lazily.
"""
