"""ComfyUI nodes for Sana, SANA-Sprint and VILA-U; see README.md beside this file.

    host.py         what the nodes take from ComfyUI
    places.py       the drop-down lists, and what their entries stand for
    model.py        what passes between the nodes: a pipeline, and the LoRAs and the ControlNet of a branch
    sampling.py     one call of a pipeline: progress, previews, interruption
    vae.py          the autoencoder behind ComfyUI's VAE socket
    previews.py     small images of latents
    nodes_sana.py, nodes_vila_u.py

At ComfyUI's start nothing of diffusers_sana, diffusers or transformers is imported: nodes do that when they run.
"""

from . import nodes_sana, nodes_vila_u


WEB_DIRECTORY = "./web"  # help pages
NODE_CLASS_MAPPINGS = {node.__name__: node for module in (nodes_sana, nodes_vila_u) for node in module.NODES}
NODE_DISPLAY_NAME_MAPPINGS = {name: node.DISPLAY_NAME for name, node in NODE_CLASS_MAPPINGS.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
