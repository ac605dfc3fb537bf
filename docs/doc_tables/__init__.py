"""The tables of the README and the docs, one file per thing that is measured. `docs/make_tables.py` writes them."""
