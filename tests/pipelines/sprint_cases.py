"""Tiny SANA-Sprint pipelines of both packages with equal weights, and their common arguments."""

from types import ModuleType
from typing import Any

import diffusers

from tests import tiny


SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
# diffusers takes multiples of 32 pixels only, and one table of sizes.
CALL = {"prompt": "a fox", "height": 32, "width": 64, "use_resolution_binning": False, "output_type": "pt"}


def sprint_pipeline(library: ModuleType, name: str = "SanaSprintPipeline", **changes: Any) -> Any:
    components = tiny.components(library, **SPRINT, **changes)
    components["scheduler"] = diffusers.SCMScheduler()
    pipe = getattr(library, name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
