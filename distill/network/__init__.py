"""Whose network is asked, how, and what is put on it: noise paths, host calls, roles, adapters, few steps."""
