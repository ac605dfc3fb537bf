"""How good is a selection, how fast is it, and how fast could it be?"""
