"""The web page of `diffusers-sana demo`, built on the public names of the package."""
