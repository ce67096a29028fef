"""What libraries say on a run on which nothing is wrong."""

import logging
import os
import sys


def quiet() -> None:
    """Silences it, before they are imported."""
    # If installed, it is imported by diffusers, and warns about kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # each retry; the error says it once
    if not sys.stderr.isatty():  # in a log a progress bar is a line for each step
        os.environ.setdefault("TQDM_DISABLE", "1")
