"""From a run's folder to what a person learns of it: a diagnosis, and a page with its curves."""
