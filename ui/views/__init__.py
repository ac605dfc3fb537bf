"""What does a person see? Every view is a function from plain data to escaped HTML, with a script that makes it move.

The same HTML stands in the browser interface (`component`, the only file here that knows gradio) and in pages that are
files (`page`). Nothing is loaded from anywhere: URLs of pictures and clips come from the caller and are checked.
"""
