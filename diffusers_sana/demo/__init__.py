"""The page behind `diffusers-sana demo`. It uses the package as its users do: by its public names."""
