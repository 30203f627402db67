"""Continuous batching: requests that come and go through fixed slots."""
