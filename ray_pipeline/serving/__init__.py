"""Serving a trained model over HTTP: engines, the front door that makes them alike, the chat page."""
