"""Checks while a run trains: data order, replica consistency, fingerprints of the state."""
