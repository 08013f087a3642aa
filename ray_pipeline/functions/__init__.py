"""Functions a user names in the config: found by name, and called in processes that can be killed."""
