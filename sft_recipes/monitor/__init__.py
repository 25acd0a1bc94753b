"""From metrics to findings: alert rules, live and offline, plots and the report."""
