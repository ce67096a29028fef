"""The bundled VILA-U from nothing: see README.md."""
