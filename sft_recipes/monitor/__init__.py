"""Rules over metrics, for the running job and for `diagnose`; plots and the report page."""
