"""The bundled demo model: scenes, networks, training, loading, evaluation."""
