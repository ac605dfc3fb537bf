"""Trainings of language models: roles on one base, the teacher's texts, filters, layers left out."""
