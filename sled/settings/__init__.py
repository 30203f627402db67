"""Settings: what a field may be, how it is traced, and how it is written down."""
