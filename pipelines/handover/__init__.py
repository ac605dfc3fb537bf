"""Handing a recipe over to a server: what vLLM and SGLang have to be told to do what hasten did, and what they cannot do."""
