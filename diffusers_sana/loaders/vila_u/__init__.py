"""VILA-U: the original checkpoint to our folder and back, and our folder as a Hub repository."""
