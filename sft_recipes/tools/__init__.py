"""Commands around a run: doctor, status, verify-resume, generate, merge."""
