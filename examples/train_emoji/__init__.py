"""The bundled checkpoint, from nothing: emoji art -> captioned pictures -> DC-AE -> Sana with its own text encoder."""
