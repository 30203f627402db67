"""The bundled model and the word problems it was trained on."""
