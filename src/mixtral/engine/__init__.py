"""Generation over token ids: ``generator`` runs the model, ``sampling`` chooses, ``pages`` shares out the cache."""
