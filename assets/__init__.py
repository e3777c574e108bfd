"""The Dagster assets: every step of the method, cached, versioned, and run again only where a change made it stale."""
