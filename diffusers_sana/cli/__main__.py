"""`python -m diffusers_sana.cli`."""

from diffusers_sana.cli import main


main()
