"""lm-evaluation-harness: the adapter, its requests and tasks, and answers kept on disk."""
