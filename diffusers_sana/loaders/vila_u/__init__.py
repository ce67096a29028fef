"""VILA-U: conversion of the official checkpoint to our folder and back, and our folder as a Hub repository.

`convert.py` and `export.py` are the two directions, `names.py` has the tensor names, `config.py` the configs, `hub.py`
the code and card of a repository, `siglip.py` initializes the vision tower from SigLIP.
"""
