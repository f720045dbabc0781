"""The loop, its optimizer, its guards and its telemetry."""
