"""Numbers of texts, and how sure they are. Nothing here knows torch."""
