"""Storage: the nodes where bytes lie. One module per driver; `registry` finds them by name, they never import one
another."""
