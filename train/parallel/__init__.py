"""Several processes, and what each device has to hold."""
