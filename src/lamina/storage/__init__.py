"""Storage nodes, which store bytes. One module per driver; `registry` finds each by its name, and they never import one
another."""
