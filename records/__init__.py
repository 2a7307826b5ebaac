"""The durable record of a run: rows and bytes. Knows neither the configuration nor the epoch loop."""
