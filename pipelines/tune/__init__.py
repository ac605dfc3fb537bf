"""The tuner: name a quality budget and some minutes, get the fastest composition that was measured to keep it.

`goal`: what may be spent. `signals`: what one full run tells about every schedule. `plan`: the schedules worth trying.
`space`: what is searched, as recipes. `trials`: what a recipe costs on prompts. `study`: the search. `verify`: held-out
prompts, controls, interactions. `result`: the front, and the recipe with its stamp.
"""
