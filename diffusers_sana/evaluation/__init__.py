"""How good drawn pictures are: against their prompts, against other pictures, and as a set. See docs/evaluation.md.

Nothing here loads a pipeline: functions take pictures `[N, 3, H, W]` in [0, 1].
"""
