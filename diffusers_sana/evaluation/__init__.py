"""Quality of generated images: against their prompts, against other images, and as a set. See docs/evaluation.md.

`run.evaluate` runs a whole evaluation of a pipeline. The measures themselves load no pipeline: they take images
`[N, 3, H, W]` in [0, 1].
"""
