"""The bundled checkpoint, from nothing: emoji art -> captioned images -> DC-AE -> Sana with its own text encoder."""
